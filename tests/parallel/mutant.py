"""Trains cases of the parity matrix with a known mistake: the tests show that the comparison sees it.

`python -m mutant OUT` trains them without one, in the ranks of a launch, and tries a layer that is idle.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import skips
import torch

from launch.selfcheck import parity
from pipeline.console import end_process
from pipeline.gan.schedules import Rates
from pipeline.parallel.ddp import ReplicatedEngine
from pipeline.parallel.engine import Engine
from pipeline.parallel.fragments import sum_of_squares
from pipeline.parallel.fsdp2 import Fsdp2Engine
from pipeline.parallel.ranks import Ranks
from pipeline.parallel.weight_penalty import LocalPenalty

CASES = ("sgd-l2-free-1", "adam-l2-clipped-2")
RAISED = "raised.txt"  # the error of a mistake that ended the training


def _penalty_times(factor: Callable[[], float]) -> Any:
    right = LocalPenalty.add_gradient

    def wrong(self: LocalPenalty, gradients: Any, now: Rates) -> None:
        right(self, gradients, replace(now, l2=now.l2 * factor(), l1=now.l1 * factor()))

    return patch.object(LocalPenalty, "add_gradient", wrong)


def _world() -> int:
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def _gradients_never_reduced() -> Iterator[None]:
    """DDP and FSDP2 accumulate without sending."""

    def replicated(self: ReplicatedEngine, last: bool) -> Any:
        return nullcontext() if self._ddp is None else self._ddp.no_sync()

    right = Fsdp2Engine.accumulating

    def sharded(self: Fsdp2Engine, last: bool) -> Any:
        return right(self, last=False)

    with (
        patch.object(ReplicatedEngine, "accumulating", replicated),
        patch.object(Fsdp2Engine, "accumulating", sharded),
    ):
        yield


def _copies_never_reduced() -> Any:
    """Hybrid sharding: gradients are averaged within a copy only."""
    right = Fsdp2Engine._reduce

    def wrong(self: Fsdp2Engine, modules: Any, now: bool) -> None:
        right(self, modules, now)
        for module in modules:
            module.set_requires_all_reduce(False, recurse=False)

    return patch.object(Fsdp2Engine, "_reduce", wrong)


def _copies_counted_in() -> Any:
    """Hybrid sharding: the norm counts every element as often as there are copies."""
    return patch.object(Engine, "total", lambda self, local: self.ranks.sum(local))


def _norm_never_reduced() -> Any:
    """Sharded players: each rank clips by the norm of its part."""
    right = Ranks.sum

    def wrong(self: Ranks, values: torch.Tensor) -> torch.Tensor:
        return values if values.ndim == 0 else right(self, values)

    return patch.object(Ranks, "sum", wrong)


def _padding_counted_in() -> Any:
    """ZeRO: the padding of a rank's flat partition counts as weights, as in a sum over all of it."""
    from pipeline.parallel.zero import ZeroEngine

    right = ZeroEngine.step

    def wrong(self: ZeroEngine, now: Any) -> Any:
        flat, known = self._flat.detach(), torch.zeros_like(self._flat, dtype=torch.bool)
        for part in self._slices:
            known[part] = True
        flat[~known] = 1.0  # uninitialised memory may hold anything
        true_sums = LocalPenalty.sums
        extra = sum_of_squares([flat[~known]])

        def sums(penalty: LocalPenalty) -> dict[str, torch.Tensor]:
            return {k: v + extra * (k == "l2_penalty") for k, v in true_sums(penalty).items()}

        with patch.object(LocalPenalty, "sums", sums):
            return right(self, now)

    return patch.object(ZeroEngine, "step", wrong)


def _other_player_neither_frozen_nor_cleaned() -> Any:
    @contextmanager
    def updating(self: Engine, frozen: Engine, twice: bool = False) -> Iterator[None]:
        frozen.frozen = True  # else DDP's wrapper would wait for its gradients
        try:
            yield
        finally:
            self.zero_grad()
            self.end_turn()
            frozen.end_turn()
            frozen.frozen = False

    return patch.object(Engine, "updating", updating)


MISTAKES: dict[str, Callable[[], Any]] = {
    "none": nullcontext,
    "doubled-penalty": lambda: _penalty_times(lambda: 2.0),
    "penalty-over-world": lambda: _penalty_times(lambda: 1 / _world()),
    "gradients-not-reduced": _gradients_never_reduced,
    "norm-not-reduced": _norm_never_reduced,
    "copies-not-reduced": _copies_never_reduced,
    "copies-counted": _copies_counted_in,
    "padding-counted": _padding_counted_in,
    "gradients-left-in-D": _other_player_neither_frozen_nor_cleaned,
}


EVERYWHERE = ("none", "doubled-penalty", "penalty-over-world")
LAST = "gradients-left-in-D"  # it may end the training
# "strategy-world" → the mistakes that can be made there. Of what ZeRO sums we reduce only the norm.
MADE = {
    "single-1": ("none", "doubled-penalty", LAST),
    "ddp-2": (*EVERYWHERE, "gradients-not-reduced", LAST),
    "fsdp2-2": (*EVERYWHERE, "gradients-not-reduced", "norm-not-reduced", LAST),
    "hsdp-4": ("none", "copies-not-reduced", "copies-counted"),
    "zero2-2": (*EVERYWHERE, "norm-not-reduced", LAST),
    "zero3-2": (*EVERYWHERE, "norm-not-reduced", "padding-counted", LAST),
}


def train(ranks: Ranks, mistakes: Sequence[str], out: Path) -> None:
    """Train the chosen cases once with each mistake, into OUT/MISTAKE."""
    chosen = [case for case in parity.cases(ranks.world) if case.name in CASES]
    for mistake in mistakes:
        folder = out / mistake
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with ExitStack() as stack:
                stack.enter_context(MISTAKES[mistake]())
                parity.train_all(chosen, ranks, folder)
        except Exception as error:
            (folder / RAISED).write_text(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    together = parity.join()
    train(together, ["none"], Path(sys.argv[1]))
    moved = skips.idle(together)
    if together.main:
        (Path(sys.argv[1]) / "idle.json").write_text(json.dumps(moved))
    together.leave()
    end_process(0)
