"""One rank of `shardgan bench memory`: train a few updates, see what is held and what is sent."""

from __future__ import annotations

import json
import resource
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from launch.bench.meter import Traffic, footprint
from launch.bench.penalty_worker import noise
from pipeline import config
from pipeline.parallel.batch import batch_shape
from pipeline.parallel.launched import read_launch
from pipeline.parallel.ranks import Ranks
from pipeline.players import build
from pipeline.run.stats import Stats
from pipeline.step import train_step

_UPDATES = 3  # the first ones allocate, and some strategies learn the order of the layers from them


def main(out: Path, settings: list[str]) -> None:
    """Measure under the strategy of the launcher; the main rank writes OUT."""
    ranks = Ranks(read_launch(), timedelta(seconds=600))
    resolved = config.load(None, settings)
    shape = batch_shape(resolved.data, ranks.world)
    gan = build(resolved, ranks, shape)
    reals, stats = noise(resolved, shape.local), Stats(ranks.device)
    for update in range(_UPDATES - 1):
        train_step(gan, reals, update * gan.batch_size, stats)
    at_step: list[dict[str, int]] = []  # of D, then of G
    hook = register_optimizer_step_pre_hook(lambda *_: at_step.append(footprint(gan)))
    with Traffic(ranks.world) as traffic:
        train_step(gan, reals, (_UPDATES - 1) * gan.batch_size, stats)
    hook.remove()
    losses = stats.reduce(ranks, {}).values
    found: dict[str, Any] = {"strategy": ranks.strategy, "world": ranks.world, "settings": settings}
    found |= {
        f"parameters_{e.player.name}": sum(f.shape.numel() for f in e.fragments) for e in (gan.G, gan.D)
    }
    found |= {"at_rest": footprint(gan), "at_step_D": at_step[0], "at_step_G": at_step[1]}
    found |= {"sent": traffic.sent, "calls": traffic.calls, "losses": losses}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found["peak"] = torch.cuda.max_memory_allocated() if ranks.device.type == "cuda" else peak
    if ranks.main:
        out.write_text(json.dumps(found))
    ranks.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
