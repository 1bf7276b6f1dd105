"""One rank of `shardgan bench memory`: train a few updates; measure what is held and sent."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from launch.bench import pair
from launch.bench.meter import Traffic, footprint
from pipeline.run.stats import Stats
from pipeline.step import train_step

_UPDATES = 3  # the first ones allocate, and some strategies learn the order of the layers from them


def main(out: Path, settings: list[str]) -> None:
    """Measure under the launcher's strategy; the main rank writes OUT."""
    ranks, gan, reals, found = pair.begin(settings)
    stats = Stats(ranks.device)
    for update in range(_UPDATES - 1):
        train_step(gan, reals, update * gan.batch_size, stats)
    at_step: list[dict[str, int]] = []  # of D, then of G
    hook = register_optimizer_step_pre_hook(lambda *_: at_step.append(footprint(gan)))
    with Traffic(ranks.world) as traffic:
        train_step(gan, reals, (_UPDATES - 1) * gan.batch_size, stats)
    hook.remove()
    found |= {"at_rest": footprint(gan), "at_step_D": at_step[0], "at_step_G": at_step[1]}
    found |= {"sent": traffic.sent, "calls": traffic.calls, "losses": stats.reduce(ranks, {}).values}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found["peak"] = torch.cuda.max_memory_allocated() if ranks.device.type == "cuda" else peak
    pair.end(ranks, out, found)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
