"""What gradient penalties cost, for `shardgan bench step`: D's turn with each, beside a plain one, in turns."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from functools import partial

import torch

from launch.bench import table
from launch.bench.meter import clocked
from pipeline.config import Config, load
from pipeline.data.stream import Batch
from pipeline.gan.schedules import at
from pipeline.parallel.batch import batch_shape
from pipeline.parallel.launched import Launch, Precision
from pipeline.parallel.ranks import Ranks
from pipeline.players import build
from pipeline.run.stats import Stats
from pipeline.step import update_D

Seconds = dict[str, list[float]]  # objective → seconds of each of its turns

_WARM_UP = 2
_PLAIN = "no gradient penalty"


def _slopes(*keys: str) -> tuple[str, ...]:
    return tuple(f"penalty.{name}.{key}" for name in ("r1", "r2") for key in ("gamma=1", "interval=1", *keys))


OBJECTIVES: Mapping[str, tuple[str, ...]] = {
    _PLAIN: (),
    "R1 + R2": _slopes(),
    "on a quarter": _slopes("fraction=1/4"),
    "finite difference": _slopes("sigma=0.1"),
    "finite difference, on a quarter": _slopes("sigma=0.1", "fraction=1/4"),
}


def measure(config: Config, images: torch.Tensor, precision: Precision, turns: int) -> Seconds:
    """D's turns on images, uint8 [batch, C, H, W], under the relativistic loss and without norms, which some
    of the penalties refuse. One pair trains under all objectives."""
    config = replace(
        config,
        loss=replace(config.loss, kind="relativistic"),
        G=replace(config.G, norm="none"),
        D=replace(config.D, norm="none"),
    )
    penalties = {name: load(None, ["data.train=none", *keys]).penalty for name, keys in OBJECTIVES.items()}
    ranks = Ranks(Launch("single", precision, 0, 1), timedelta(seconds=config.run.timeout_s))
    gan = build(config, ranks, batch_shape(config.data, 1))
    stats, batch = Stats(ranks.device), Batch(images, None)
    seconds: Seconds = {name: [] for name in penalties}
    for turn in range(_WARM_UP + turns):
        for name, penalty in penalties.items():
            trained = replace(gan, at=partial(at, replace(config, penalty=penalty)))
            with clocked(seconds[name]):
                update_D(trained, batch, turn * config.data.batch_size, stats)
    return {name: taken[_WARM_UP:] for name, taken in seconds.items()}


def report(seconds: Mapping[str, Seconds], batch: int) -> None:
    """seconds: by arithmetic."""
    rows = []
    for arithmetic, found in seconds.items():
        for name, taken in found.items():
            times = statistics.median(a / b for a, b in zip(taken, found[_PLAIN], strict=True))
            fastest = min(taken) / min(found[_PLAIN])
            row = [f"{name} {arithmetic}", f"{batch / statistics.median(taken):.1f}", f"{times:.2f} ({fastest:.2f})"]
            rows.append(row)
    turns = len(next(iter(next(iter(seconds.values())).values())))
    table.show(
        "D's turn, relativistic, norms none",
        ("images/s", "times the plain turn"),
        rows,
        f"Medians (in brackets: fastest) of {turns} turns of one update of D.",
    )
