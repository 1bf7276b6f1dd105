"""Means over a tick that began in another world: every update weighs the same, whoever made it."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.config import WeightPenalty
from pipeline.gan.schedules import Rates
from pipeline.parallel.engine import Contribution
from pipeline.parallel.weight_penalty import LocalPenalty
from pipeline.run.stats import Stats

ALONE: Any = SimpleNamespace(rank=0, world=1, main=True, sum=lambda table: table)


def of_ranks(world: int, rounds: int, losses: list[float], unit: float) -> list[Any]:
    """What each rank of a world has accumulated over one update per loss, for a checkpoint."""
    ranks = [Stats(torch.device("cpu"), world * rounds) for _ in range(world)]
    for stats in ranks:
        for loss in losses:
            for _ in range(rounds):
                stats.mean("Loss/D/adversarial", torch.tensor(loss))
            stats.add({"Gradients/D/skipped": Contribution(torch.tensor(loss > 1), unit / world, unit)})
    return [stats.state() for stats in ranks]


@pytest.mark.parametrize(("world", "rounds", "unit"), [(2, 1, 2.0), (3, 2, 3.0), (2, 1, 1.0)])
def test_a_tick_begun_by_more_ranks_and_ended_by_one(world, rounds, unit):
    """Replicated players' figures come from every rank, sharded ones' in parts (unit 1)."""
    stats = Stats(torch.device("cpu"), 1)
    stats.load(ALONE, of_ranks(world, rounds, [1.0, 1.0, 1.0], unit))
    stats.mean("Loss/D/adversarial", torch.tensor(5.0))
    stats.add({"Gradients/D/skipped": Contribution(torch.tensor(1.0), 1.0, 1.0)})
    reduced = stats.reduce(ALONE, {})
    assert reduced.values["Loss/D/adversarial"] == pytest.approx(2.0, rel=1e-12)
    assert reduced.values["Gradients/D/skipped"] == pytest.approx(0.25, rel=1e-12)
    assert reduced.updates == {name: pytest.approx(4.0) for name in reduced.updates}


def test_the_same_world_goes_on_from_the_very_sums():
    (saved,) = of_ranks(1, 3, [0.1, 0.7], 1.0)
    stats = Stats(torch.device("cpu"), 3)
    stats.load(ALONE, [saved])
    assert stats.state() == saved


def test_a_second_exchange_finds_the_ranks_of_what_is_not_finite():
    """Two ranks; the first has a NaN, the second an infinity and the sum of both."""
    calls, flags = [], torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64)

    def summed(table):
        calls.append("sum")
        table[:3] += torch.tensor([0.0, math.inf, 0.0], dtype=torch.float64)
        return table

    def gathered(mine):
        calls.append("gather")
        return torch.cat([mine, flags])

    ranks: Any = SimpleNamespace(rank=0, world=2, main=True, sum=summed, gather=gathered)
    stats = Stats(torch.device("cpu"), 1)
    for value in (math.nan, 1.0):
        for name in "abc":
            stats.mean(name, torch.tensor(value if name == "c" else 1.0))
        reduced = stats.reduce(ranks, {"seconds": 2.0})
        assert reduced.broken == ({"b": [1], "c": [0]} if math.isnan(value) else {"b": [1]})
        assert reduced.each == {"seconds": [2.0, 0.0]}
    assert calls == ["sum", "gather"] * 2
    summed_alone: Any = SimpleNamespace(rank=0, world=2, main=True, sum=lambda table: table)
    stats.mean("a", torch.tensor(1.0))
    assert stats.reduce(summed_alone, {}).broken == {}


def test_totals_are_those_of_adding_every_report_by_itself():
    """Bit for bit: in fp32, fp64 and bool, with rounds, a name that comes late and one that is left out."""
    generator = torch.Generator().manual_seed(0)
    stats, alone = Stats(torch.device("cpu"), 1), {}

    def report(name: str, value: torch.Tensor) -> None:
        stats.add({name: Contribution(value, 1.0, 1.0)})
        alone[name] = alone.get(name, torch.zeros((), dtype=torch.float64)) + value

    for update in range(7):
        for _ in range(2):
            report("Loss/D/adversarial", torch.randn((), generator=generator))
            report("Loss/scores/real", torch.randn((), generator=generator))
        report("Loss/D/l2_penalty", torch.rand((), generator=generator, dtype=torch.float64))
        if update % 3:
            report("Loss/D/r1_penalty", torch.rand((), generator=generator))
        report("Gradients/D/skipped", torch.tensor(update == 4))
        report("Loss/G/adversarial", torch.randn((), generator=generator))
        if update == 3:  # saved and gone on with in the middle
            saved, stats = stats.state(), Stats(torch.device("cpu"), 1)
            stats.load(ALONE, [saved])
    assert {name: total for name, (total, _, _) in stats.state().items()} == {
        name: float(total) for name, total in alone.items()
    }
    assert stats.reduce(ALONE, {}).updates["Loss/D/adversarial"] == 14


def test_a_loss_is_the_sum_of_its_parts_whatever_they_are_called():
    """Summed in a fixed order, as the sum rounds."""
    stats = Stats(torch.device("cpu"), 1)
    parts = {
        "adversarial": 1.0,
        "l2_penalty": 1e-16,
        "l1_penalty": -1.0,
        "r1_penalty": 0.25,
        "new_penalty": 2.0,
    }
    for part, value in reversed(parts.items()):
        stats.mean(f"Loss/D/{part}", torch.tensor(value, dtype=torch.float64))
    stats.mean("Loss/scores/real", torch.tensor(100.0))
    values = stats.reduce(ALONE, {}).values
    assert values["Loss/D/loss"] == (1.0 + 1e-16 - 1.0) + 2.0 + 0.25 and "Loss/G/loss" not in values


class Launches(TorchDispatchMode):
    """Counts operations that are not views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def test_an_update_takes_little_more_than_a_launch_for_each_type_however_many_charts_there_are():
    stats = Stats(torch.device("cpu"), 1)
    update = {f"Loss/{n}": Contribution(torch.tensor(float(n)), 1.0, 1.0) for n in range(30)}
    update |= {f"Gradients/{n}": Contribution(torch.tensor(float(n)).double(), 1.0, 1.0) for n in range(30)}
    for _ in range(40):
        stats.add(update)
    with Launches() as launches:
        for _ in range(32):
            stats.add(update)
    assert launches.count == 2 * (32 + 1)


def test_factors_are_multiplied_in_one_after_another():
    """As if each report had been multiplied before it was added."""
    stats, whole, generator = (
        Stats(torch.device("cpu")),
        Stats(torch.device("cpu")),
        torch.Generator().manual_seed(0),
    )
    for update in range(70):
        value = torch.rand((), dtype=torch.float64, generator=generator)
        l2 = 1e-4 * (update + 1)
        stats.add({"a": Contribution(value, 1.0, 1.0, (l2, 4 * l2)), "b": Contribution(value, 1.0, 1.0)})
        whole.add({"a": Contribution(4 * l2 * (l2 * value), 1.0, 1.0), "b": Contribution(value, 1.0, 1.0)})
    assert stats.state() == whole.state()


def test_scores_and_signs_of_pairs():
    stats = Stats(torch.device("cpu"))
    real, fake = torch.tensor([1.0, -2.0, 3.0, 4.0]), torch.tensor([2.0, -3.0, 1.0, 3.5])
    stats.scores(real, fake, paired=True)
    values = stats.reduce(ALONE, {}).values
    assert values["Loss/scores/real"] == 1.5 and values["Loss/scores/fake"] == 0.875
    assert values["Loss/signs/real"] == 0.5 and values["Loss/signs/paired"] == 0.5  # 3 of 4 pairs
    stats.scores(real, fake)
    assert "Loss/signs/paired" not in stats.reduce(ALONE, {}).values


def test_charts_of_a_scheduled_penalty_are_of_each_update_at_its_own_strength():
    """Σ over updates of λ‖W‖² and of ‖∂(λ‖W‖² + λ'‖W‖₁)/∂W‖², by autograd, with and without L1."""
    for l1 in (0.0, 0.3):
        weight = torch.tensor([1.0, -2.0, 0.0, 4.0])
        penalty = LocalPenalty(WeightPenalty(l2=(0.5, 0.0), l1=(l1, l1) if l1 else 0.0), [weight])
        stats, squares, values = Stats(torch.device("cpu")), 0.0, 0.0
        for l2 in (0.5, 0.25, 0.0):
            now, sums = Rates(2e-4, (0.5, 0.999), l2, l1), penalty.sums()
            leaf = weight.double().requires_grad_()
            (l2 * leaf.square().sum() + l1 * leaf.abs().sum()).backward()
            squares, values = squares + float(leaf.grad.square().sum()), values + l2 * 21
            penalty.add_gradient([added := torch.zeros(4)], now)
            assert torch.equal(added, leaf.grad.float())
            for name, value in (sums | penalty.gradient(sums, now)).items():
                stats.add({name: Contribution(value, 1.0, 1.0, penalty.factors(now)[name])})
        found = stats.reduce(ALONE, {}).values
        assert found["l2_penalty"] == pytest.approx(values / 3)
        assert found["penalty"] == pytest.approx(squares / 3)
