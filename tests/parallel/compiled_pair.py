"""Compiled players beside the same players uncompiled, in the ranks of a launch: see `record`.

accelerate launch … -m compiled_pair OUT.json [BACKEND]
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from launch.selfcheck import parity
from launch.selfcheck.parity import CLIPPED, SGD, Case
from pipeline.console import end_process
from pipeline.parallel.compilation import Compilation
from pipeline.parallel.compiled import during_update
from pipeline.parallel.ranks import Ranks
from pipeline.run.stats import Stats
from pipeline.step import train_step

_UPDATES = 3
_SLOPES = ("penalty.r1.gamma=1", "penalty.r1.interval=2", "penalty.r2.gamma=1", "penalty.r2.interval=2")
CASES = {
    "clipped": Case("clipped", (*SGD, *CLIPPED, "penalty.l2=1e-3"), rounds=2),
    "r1-r2": Case("r1-r2", (*SGD, "loss.kind=relativistic", *_SLOPES), rounds=2),
}
WHERE = ("ddp-2", "fsdp2-2", "zero2-2")  # of the launches that the tests share


def record(ranks: Ranks, backend: str = "aot_eager") -> dict[str, dict[str, Any]]:
    """For each case: the largest difference of any weight or average to that of uncompiled players, how many
    tensors training moved, names that are not the same, in which passes of D compiled code computed, and
    what was said while something was compiled."""
    return {name: _record(case, ranks, backend) for name, case in CASES.items()}


def _record(case: Case, ranks: Ranks, backend: str) -> dict[str, Any]:
    plain, names, _, _ = _train(case, ranks, None)
    compiled, same_names, used, said = _train(case, ranks, Compilation(backend))
    differences = [(plain[name] - compiled[name]).abs().max().item() for name in plain]
    return {"worst": max(differences), "names": sorted(names ^ same_names), "used": used, "said": said}


def _train(case: Case, ranks: Ranks, how: Compilation | None) -> tuple[Any, set[str], list[Any], list[str]]:
    ranks.compilation = how
    state, stats = parity.initial_state(case), Stats(ranks.device)
    gan, batches = parity.start(case, state, ranks)
    used: list[Any] = []
    said: set[str] = set()

    def look(*_: object) -> None:
        if gan.D.compiled:
            used.append([state.cur_nimg // case.batch, gan.D.frozen, gan.D.compiled.used])

    def around() -> Any:
        said.add(f"{ranks.progress.doing}, {ranks.progress.updating}")
        return nullcontext()

    gan.D.module.register_forward_pre_hook(look)
    for _ in range(_UPDATES):
        with during_update(ranks, around):
            state.cur_nimg = train_step(gan, batches, state.cur_nimg, stats)
    ranks.compilation = None
    module: torch.nn.Module = gan.D.module
    names = {name for name, _ in (*module.named_parameters(), *module.named_modules())} | {
        *module.state_dict()
    }
    distinct = sorted({tuple(each) for each in used})
    return parity.whole(gan), names, distinct, sorted(said)


if __name__ == "__main__":
    joined = parity.join()
    found = record(joined, *sys.argv[2:])
    if joined.main:
        Path(sys.argv[1]).write_text(json.dumps(found))
    joined.leave()
    end_process(0)
