"""Sums over ranks where each element is on one rank, on all of them, or on a number in between."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Lock
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.parallel.ddp import ReplicatedEngine
from pipeline.parallel.engine import Engine
from pipeline.parallel.fragments import Fragment, sum_of_squares
from pipeline.run.stats import Stats

WORLD = 4
WEIGHT = torch.arange(1.0, 13.0).view(4, 3)
SQUARES = float(WEIGHT.square().sum())


class Meeting:
    """Sums over threads, as `Ranks.sum` does over ranks: in place, in an order of its own."""

    def __init__(self) -> None:
        self.barrier, self.lock, self.tensors, self.messages = Barrier(WORLD), Lock(), [], 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        with self.lock:
            self.tensors.append(values.clone())
            self.messages += 1
        self.barrier.wait(10)
        values.copy_(torch.stack(self.tensors).sum(0))
        if self.barrier.wait(10) == 0:
            self.tensors.clear()
        self.barrier.wait(10)
        return values


def engine_of(rank: int, copies: int, meeting: Meeting) -> Any:
    """A rank that holds rows of one parameter; neighbours share one copy."""
    parts = WORLD // copies
    rows = WEIGHT.chunk(parts)[rank % parts]
    fragment = Fragment("weight", (rank % parts) * rows.numel(), WEIGHT.shape, rows.clone(), True)
    ranks = SimpleNamespace(
        rank=rank, world=WORLD, main=rank == 0, device=torch.device("cpu"), sum=meeting.sum
    )
    concrete = dict.fromkeys(Engine.__abstractmethods__)
    engine = type("Invented", (Engine,), concrete | {"fragments": [fragment], "copies": copies})
    made = object.__new__(engine)
    made.ranks, made.player = ranks, SimpleNamespace(name="G")
    return made


def on_every_rank(copies: int, work: Any) -> tuple[list[Any], Meeting]:
    meeting = Meeting()
    with ThreadPoolExecutor(WORLD) as pool:
        return list(pool.map(lambda rank: work(engine_of(rank, copies, meeting)), range(WORLD))), meeting


@pytest.mark.parametrize("copies", [1, 2, 4])
def test_whole_tensors_are_whole_whatever_the_number_of_copies(copies):
    found, _ = on_every_rank(copies, lambda e: dict(e.whole([f.data for f in e.fragments]))["weight"])
    assert all(torch.equal(tensor, WEIGHT) for tensor in found)


@pytest.mark.parametrize("copies", [1, 2, 4])
def test_a_norm_counts_every_element_once_and_is_the_same_on_all_ranks(copies):
    found, meeting = on_every_rank(copies, lambda e: e.agreed(sum_of_squares([e.fragments[0].data]), {}))
    assert len({float(value) for value in found}) == 1 and float(found[0]) == pytest.approx(SQUARES)
    assert meeting.messages == (0 if copies == WORLD else WORLD)


@pytest.mark.parametrize("copies", [1, 2, 4])
def test_a_value_that_is_not_finite_on_one_rank_is_so_on_all(copies):
    def norm(engine: Engine) -> torch.Tensor:
        penalty = torch.tensor(torch.nan if engine.ranks.rank == 3 else 1.0, dtype=torch.float64)
        return engine.agreed(torch.ones((), dtype=torch.float64), {"l2_penalty": penalty})

    found, _ = on_every_rank(copies, norm)
    unlike = copies == WORLD  # DDP makes the loss NaN instead, before the gradients are averaged
    assert [bool(value.isnan()) for value in found] == [not unlike] * 3 + [True]


@pytest.mark.parametrize("copies", [1, 2, 4])
def test_charts_count_every_element_once_per_update(copies):
    def reduced(engine: Engine) -> Any:
        stats = Stats(engine.ranks.device)
        for _ in range(3):
            stats.add(engine.chart("Loss", {"l2_penalty": sum_of_squares([engine.fragments[0].data])}))
        return stats.reduce(engine.ranks, {})

    for found in on_every_rank(copies, reduced)[0]:
        assert found.values["Loss/G/l2_penalty"] == pytest.approx(SQUARES)
        assert found.updates == {"Loss/G/l2_penalty": 3.0}


@pytest.mark.parametrize("copies", [1, 2, 4])
def test_each_element_is_written_once(copies):
    found, _ = on_every_rank(copies, lambda e: e.fragments[0].data.numel() * e.in_first_copy)
    assert sum(found) == WEIGHT.numel() and found[0] > 0


def test_a_replicated_player_has_as_many_copies_as_there_are_ranks():
    assert ReplicatedEngine.copies.fget(SimpleNamespace(ranks=SimpleNamespace(world=3))) == 3
