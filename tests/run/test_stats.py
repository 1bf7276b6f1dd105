"""Means over a tick that began in another world: every update weighs the same, whoever made it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.parallel.engine import Share
from pipeline.run.stats import Stats

ALONE: Any = SimpleNamespace(rank=0, world=1, main=True, sum=lambda table: table)


def of_ranks(world: int, rounds: int, losses: list[float], unit: float) -> list[Any]:
    """What each rank of a world has accumulated over one update per loss, for a checkpoint."""
    ranks = [Stats(torch.device("cpu"), world * rounds) for _ in range(world)]
    for stats in ranks:
        for loss in losses:
            for _ in range(rounds):
                stats.mean("Loss/D/adversarial", torch.tensor(loss))
            stats.add({"Gradients/D/skipped": Share(torch.tensor(loss > 1), unit / world, unit)})
    return [stats.state() for stats in ranks]


@pytest.mark.parametrize(("world", "rounds", "unit"), [(2, 1, 2.0), (3, 2, 3.0), (2, 1, 1.0)])
def test_a_tick_begun_by_more_ranks_and_ended_by_one(world, rounds, unit):
    """Replicated players' figures come from every rank, sharded ones' in parts (unit 1)."""
    stats = Stats(torch.device("cpu"), 1)
    stats.load(ALONE, of_ranks(world, rounds, [1.0, 1.0, 1.0], unit))
    stats.mean("Loss/D/adversarial", torch.tensor(5.0))
    stats.add({"Gradients/D/skipped": Share(torch.tensor(1.0), 1.0, 1.0)})
    reduced = stats.reduce(ALONE, {})
    assert reduced.values["Loss/D/adversarial"] == pytest.approx(2.0, rel=1e-12)
    assert reduced.values["Gradients/D/skipped"] == pytest.approx(0.25, rel=1e-12)
    assert reduced.updates == {name: pytest.approx(4.0) for name in reduced.updates}


def test_the_same_world_goes_on_from_the_very_sums():
    (saved,) = of_ranks(1, 3, [0.1, 0.7], 1.0)
    stats = Stats(torch.device("cpu"), 3)
    stats.load(ALONE, [saved])
    assert stats.state() == saved
