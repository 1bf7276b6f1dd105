"""How a global batch lies over ranks and rounds."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.config import Optimizer, UserError, WeightPenalty
from pipeline.gan.draws import Drawn
from pipeline.parallel.batch import BatchShape
from pipeline.parallel.ddp import ReplicatedEngine
from pipeline.parallel.engine import PlayerSettings
from pipeline.parallel.watch.whereabouts import Progress

IMAGES = 2


@pytest.mark.parametrize(
    ("images", "remedy"), [(12, "data.batch_gpu=6"), (5, "data.batch_gpu=1"), (1, "G.checkpoint=true")]
)
def test_full_memory_is_a_message_with_a_remedy(images, remedy):
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee also")
    with (
        pytest.raises(UserError, match=rf"{images} images? at once\. Set {remedy}.* allocate 2\.00 GiB\.$"),
        BatchShape(2, 2, images).explaining_shortage(),
    ):
        raise full


@pytest.mark.parametrize(("world", "rounds"), [*itertools.product((1, 2, 3), (1, 2, 3))])
def test_rounds_of_all_ranks_are_the_global_batch(world, rounds):
    shape = BatchShape(world, rounds, IMAGES)
    size = world * rounds * IMAGES
    z, c = torch.arange(2.0 * size).view(size, 2), torch.arange(size)
    given = Drawn(z, c, 0, augmentation=3 * z, mix=c / 2)
    engines = [_engine(shape, rank) for rank in range(world)]
    assert [e.samples.among(c).tolist() for e in engines] == [shape.positions(rank) for rank in range(world)]
    ranks = [engine.rounds(_part(engine, given), engine.samples.among(c)) for engine in engines]
    wholes = (z, c, given.augmentation, given.mix, c)
    for number, of_round in enumerate(zip(*ranks, strict=True)):
        part = slice(number * size // rounds, (number + 1) * size // rounds)
        mine = [(drawn.z, drawn.c, drawn.augmentation, drawn.mix, local) for drawn, local in of_round]
        for found, whole in zip(zip(*mine, strict=True), wholes, strict=True):
            assert torch.equal(torch.cat(found), whole[part])
    assert number == rounds - 1


def _part(engine: ReplicatedEngine, drawn: Drawn) -> Drawn:
    """A rank's."""
    return Drawn(*(engine.samples.among(x) if torch.is_tensor(x) else x for x in drawn))


def _engine(shape: BatchShape, rank: int) -> ReplicatedEngine:
    ranks: Any = SimpleNamespace(
        rank=rank,
        world=1,
        device=torch.device("cpu"),
        precision="no",
        low_precision=None,
        progress=Progress(),
    )
    player = PlayerSettings("G", Optimizer(), WeightPenalty(), {})
    return ReplicatedEngine(nn.Linear(2, 1), player, ranks, shape, ())
