"""Runs the parity matrix with one known mistake put into the training: `python -m mutant MISTAKES OUT`.

For the tests that show that the comparison sees such mistakes; started by `accelerate launch` like the real
one. Several mistakes (with commas between) are made one after the other, each into OUT/MISTAKE.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

from launch import parity
from pipeline.parallel.ddp import ReplicatedEngine
from pipeline.parallel.engine import Engine
from pipeline.parallel.weight_penalty import LocalPenalty

CASES = ("sgd-l2-free-1", "adam-l2-clipped-2")


def _penalty_times(factor: Callable[[], float]) -> Any:
    right = LocalPenalty.add_gradient

    def wrong(self: LocalPenalty, gradients: Any, scale: float = 1.0) -> None:
        right(self, gradients, scale * factor())

    return patch.object(LocalPenalty, "add_gradient", wrong)


def _world() -> int:
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_initialized() else 1


def _never_reduced() -> Any:
    def accumulating(self: ReplicatedEngine, last: bool) -> Any:
        return nullcontext() if self._ddp is None else self._ddp.no_sync()

    return patch.object(ReplicatedEngine, "accumulating", accumulating)


def _other_player_neither_frozen_nor_cleaned() -> Any:
    @contextmanager
    def updating(self: Engine, frozen: Engine) -> Iterator[None]:
        frozen.frozen = True  # bare all the same, as DDP's wrapper would wait for its gradients
        try:
            yield
        finally:
            self.zero_grad()
            frozen.frozen = False

    return patch.object(Engine, "updating", updating)


MISTAKES: dict[str, Callable[[], Any]] = {
    "none": nullcontext,
    "doubled-penalty": lambda: _penalty_times(lambda: 2.0),
    "penalty-over-world": lambda: _penalty_times(lambda: 1 / _world()),
    "no-reduction": _never_reduced,
    "gradients-left-in-D": _other_player_neither_frozen_nor_cleaned,
}


def main(mistakes: list[str], out: Path) -> None:
    """Train the chosen cases once with each mistake."""
    chosen = [case for case in parity.cases() if case.name in CASES]
    for mistake in mistakes:
        with ExitStack() as stack:
            stack.enter_context(patch.object(parity, "cases", lambda: chosen))
            stack.enter_context(patch.object(parity.Ranks, "leave", lambda self: None))  # more is to come
            stack.enter_context(MISTAKES[mistake]())
            (out / mistake).mkdir(parents=True, exist_ok=True)
            parity.main(out / mistake)


if __name__ == "__main__":
    main(sys.argv[1].split(","), Path(sys.argv[2]))
