"""A world of 1,024 ranks, of which a few are built in this process over a group that sends nothing."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from pipeline.config import Optimizer, WeightPenalty
from pipeline.data.plan import Split
from pipeline.data.stages import PlannedSamples
from pipeline.parallel.batch import BatchShape
from pipeline.parallel.engine import PlayerSettings
from pipeline.parallel.fsdp2 import Fsdp2Engine

WORLD = 1024
BUILT = (0, 1, 511, 999, 1000, 1023)
SHARDS = {"fsdp2": WORLD, "hsdp": 8}  # how many ranks share a copy of a player
ROWS = {"wide": 2048, "uneven": 1500, "narrow": 1000, "one": 1}  # of linear layers, in a world of 1,024


@contextmanager
def a_rank_of_many(rank: int, shards: int) -> Iterator[Any]:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=WORLD)
    copy, place, several = rank - rank % shards, rank % shards, shards < WORLD
    try:
        yield SimpleNamespace(
            rank=rank, world=WORLD, main=rank == 0, device=torch.device("cpu"), strategy="hsdp",
            precision="no", low_precision=None, keep_gathered=False, progress=SimpleNamespace(moves=0),
            shards=shards,
            within_copy=dist.new_group([*range(copy, copy + shards)]) if several else None,
            over_copies=dist.new_group([*range(place, WORLD, shards)]) if several else None,
        )  # fmt: skip
    finally:
        dist.destroy_process_group()


def layers() -> nn.Module:
    return nn.Sequential(OrderedDict((name, nn.Linear(3, rows)) for name, rows in ROWS.items()))


@pytest.fixture(scope="module")
def engines() -> dict[str, dict[int, Fsdp2Engine]]:
    """Strategy → rank → its engine."""
    found: dict[str, dict[int, Fsdp2Engine]] = {strategy: {} for strategy in SHARDS}
    for strategy, shards in SHARDS.items():
        for rank in BUILT:
            with a_rank_of_many(rank, shards) as ranks:
                player = PlayerSettings("D", Optimizer(lr=1e-3), WeightPenalty(), {})
                found[strategy][rank] = Fsdp2Engine(layers(), player, ranks, BatchShape(WORLD, 1, 2 * WORLD))
    return found


def owned(rank: int, shape: torch.Size, shards: int) -> range:
    """The elements that PyTorch gives to a rank of the world, by its own account."""
    local, first = Shard.local_shard_size_and_offset(shape[0], shards, rank % shards)
    row = shape.numel() // shape[0]
    return range(first * row, (first + local) * row)


@pytest.mark.parametrize("strategy", SHARDS)
def test_fragments_are_where_pytorch_has_them(engines, strategy):
    for rank, engine in engines[strategy].items():
        assert engine.copies == WORLD // SHARDS[strategy]
        for fragment in engine.fragments:
            parameter = dict(engine.module.named_parameters())[fragment.name]
            assert isinstance(parameter, DTensor)
            assert fragment.data.numel() == parameter.to_local().numel()
            expected = owned(rank, fragment.shape, SHARDS[strategy])
            if expected:  # else where it would start says nothing
                assert range(fragment.start, fragment.start + fragment.data.numel()) == expected
            assert fragment.data.numel() == len(expected)


@pytest.mark.parametrize("strategy", SHARDS)
def test_every_element_is_owned_once_in_each_copy(engines, strategy):
    for fragment in engines[strategy][0].fragments:
        parts = [owned(rank, fragment.shape, SHARDS[strategy]) for rank in range(WORLD)]
        times = np.bincount(np.concatenate([np.asarray(part, np.int64) for part in parts]))
        assert times.tolist() == [WORLD // SHARDS[strategy]] * fragment.shape.numel()


def test_many_ranks_own_nothing_of_a_narrow_layer(engines):
    (narrow,) = (f for f in engines["fsdp2"][1000].fragments if f.name == "narrow.weight")
    assert narrow.data.numel() == 0
    assert sum(f.data.numel() for f in engines["fsdp2"][1023].fragments) == 2 * (3 + 1)  # of `wide` alone


@pytest.mark.parametrize("rounds", [1, 2])
def test_every_sample_comes_once_per_epoch(rounds):
    """Batches of 4,096 that end in the middle of an epoch of 40,000 samples: the ranks' parts of ten of them
    are the positions 0, 1, 2, …, and the first 40,000 are every sample once."""
    plan, batch, steps = Split([40] * 1000, 0, 16).training(), 4 * WORLD, 10
    parts = []
    for rank in range(WORLD):
        source: Any = PlannedSamples(SimpleNamespace(), plan, 0, batch, rank, WORLD, rounds)  # type: ignore[arg-type]
        ahead = source.steps()
        parts += [position for _ in range(steps) for part in next(ahead) for position in part]
    assert sorted(parts) == list(range(steps * batch))
    samples = plan.samples(0, plan.size)
    assert len(np.unique(samples[:, 0] * 40 + samples[:, 1])) == plan.size == 40_000
