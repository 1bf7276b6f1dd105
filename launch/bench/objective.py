"""What gradient penalties cost, for `shardgan bench step`: D's turn with them beside one without."""

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
    "R1 + R2, on a quarter": _slopes("fraction=1/4"),
    "finite difference": _slopes("sigma=0.1"),
    "finite difference, on a quarter": _slopes("sigma=0.1", "fraction=1/4"),
}


def measure(config: Config, precision: Precision, turns: int) -> Seconds:
    """D's turns on images of noise, one of each objective after another.

    Under the relativistic loss and without norms, which penalties on fakes refuse. One pair has them all.
    """
    norm_free = {player: replace(getattr(config, player), norm="none") for player in "GD"}
    config = replace(config, loss=replace(config.loss, kind="relativistic"), **norm_free)
    ranks = Ranks(Launch("single", precision, 0, 1), timedelta(seconds=config.run.timeout_s))
    gan = build(config, ranks, batch_shape(config.data, 1))
    penalties = {name: load(None, ["data.train=none", *keys]).penalty for name, keys in OBJECTIVES.items()}
    data, stats = config.data, Stats(ranks.device)
    images = torch.randint(0, 256, (data.batch_size, data.channels, data.size, data.size), dtype=torch.uint8)
    seconds: Seconds = {name: [] for name in penalties}
    for turn in range(_WARM_UP + turns):
        for name, penalty in penalties.items():
            trained = replace(gan, at=partial(at, replace(config, penalty=penalty)))
            with clocked(seconds[name]):
                update_D(trained, Batch(images, None), turn * data.batch_size, stats)
    return {name: taken[_WARM_UP:] for name, taken in seconds.items()}


def report(seconds: Mapping[str, Seconds], batch: int) -> None:
    """Print a table. seconds: what `measure` returned, by arithmetic."""
    turns = {len(taken) for found in seconds.values() for taken in found.values()}
    table.show(
        "D's turn, relativistic, norms none",
        ("images/s", "times the first"),
        [_row(arithmetic, name, seconds[arithmetic], batch) for arithmetic in seconds for name in OBJECTIVES],
        f"Medians (in brackets: fastest) of {max(turns)} turns of D",
    )


def _row(arithmetic: str, name: str, seconds: Seconds, batch: int) -> list[str]:
    taken, plain = seconds[name], seconds[_PLAIN]
    times = statistics.median(a / b for a, b in zip(taken, plain, strict=True))
    per_second = f"{batch / statistics.median(taken):.1f}"
    return [f"{name}, {arithmetic}", per_second, f"{times:.2f} ({min(taken) / min(plain):.2f})"]
