"""Randomness inside networks: the streams of torch.manual_seed, at a fraction of its cost."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import dropout

from pipeline.config import Optimizer, WeightPenalty
from pipeline.gan.draws import Drawn
from pipeline.parallel.batch import BatchShape
from pipeline.parallel.ddp import ReplicatedEngine
from pipeline.parallel.engine import PlayerSettings
from pipeline.parallel.seeding import seed_generators
from pipeline.parallel.watch.whereabouts import Progress

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _default_generator_as_it_was():
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, 2**63 + 5])
def test_the_stream_is_that_of_manual_seed(seed):
    torch.manual_seed(seed)
    expected = dropout(torch.ones(100), 0.5)
    torch.manual_seed(7)
    seed_generators(seed, CPU)
    assert torch.equal(dropout(torch.ones(100), 0.5), expected)


def test_a_gpu_draws_from_the_generator_that_was_seeded(monkeypatch):
    """The generator of the device's index, or of the current device if it has none; no other."""
    seeded: list[tuple[int, int]] = []
    generators = [
        SimpleNamespace(manual_seed=lambda seed, gpu=gpu: seeded.append((gpu, seed))) for gpu in (0, 1)
    ]
    monkeypatch.setattr(torch.cuda, "default_generators", generators)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    seed_generators(5, torch.device("cuda:1"))
    seed_generators(6, torch.device("cuda"))
    assert seeded == [(1, 5), (0, 6)]


def test_every_round_is_seeded_by_rank_and_round_without_manual_seed(monkeypatch):
    ranks: Any = SimpleNamespace(
        rank=0, world=1, device=CPU, precision="no", low_precision=None, progress=Progress()
    )
    player = PlayerSettings("G", Optimizer(), WeightPenalty(), {})
    engine = ReplicatedEngine(nn.Linear(2, 1), player, ranks, BatchShape(1, 3, 2), ())
    ranks.rank = 1
    expected = []
    for number in range(3):
        torch.manual_seed(100 + 3 + number)
        expected.append(torch.rand(4))

    def forbidden(_: int) -> None:
        raise AssertionError("torch.manual_seed costs as much as a pass")

    monkeypatch.setattr(torch, "manual_seed", forbidden)
    drawn = Drawn(torch.zeros(6, 2), None, 100)
    assert all(torch.equal(torch.rand(4), e) for e, _ in zip(expected, engine.rounds(drawn), strict=False))


def test_nothing_that_trains_calls_manual_seed():
    files = [path for path in (ROOT / "pipeline").rglob("*.py") if "torch.manual_seed(" in path.read_text()]
    assert not files
