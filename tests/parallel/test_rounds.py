"""FSDP2 over several rounds of an update, where blocks are told late that they may reduce."""

from __future__ import annotations

import copy

import pytest
import torch
from device_thread import device_thread
from test_devices import alone as alone  # a world of one
from torch import Tensor, nn

from pipeline.config import Optimizer, WeightPenalty
from pipeline.gan import second_order
from pipeline.parallel.batch import BatchShape
from pipeline.parallel.engine import PlayerSettings
from pipeline.parallel.fsdp2 import Fsdp2Engine

ROUNDS = 2


class Skipping(nn.Module):
    """Runs some of its blocks, and one parameter of its own, only in some passes."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
        self.scale, self.never = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor, run: list[int]) -> Tensor:
        for number in run:
            x = torch.tanh(self.blocks[number](x))
        return x * self.scale if 1 in run else x


@pytest.mark.parametrize("runs", [([0, 1, 2], [0, 2]), ([0, 2], [0, 1, 2]), ([1], [0]), ([0, 1, 2],) * 2])
@pytest.mark.parametrize("passes", [1, 2])
def test_what_ran_in_some_rounds_only_has_its_gradient(alone, runs, passes):
    torch.manual_seed(0)
    network = Skipping()
    plain, x = copy.deepcopy(network), torch.randn(ROUNDS, passes, 2, 3)
    player = PlayerSettings("D", Optimizer(), WeightPenalty(), {})
    engine = Fsdp2Engine(network, player, alone, BatchShape(1, ROUNDS, 2))
    for update in range(2):  # what is set in the first one holds in the second
        for number, run in enumerate(runs):
            with engine.accumulating(last=number == ROUNDS - 1):
                engine.backward(sum(engine(part, run).square().sum() for part in x[number]))
        engine.collect_gradients()
        plain.zero_grad()
        losses = (plain(part, run).square().sum() for r, run in enumerate(runs) for part in x[r])
        sum(losses).div(ROUNDS).backward()
        for name, parameter in plain.named_parameters():
            due = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(
                engine._masters[name].grad, due, msg=f"{name} in update {update}: other gradient"
            )
        engine.zero_grad()
        engine.end_turn()


@pytest.fixture
def differentiate(alone):
    """A D with R1. No nonlinearity is behind its last layer, which only the double backward completes."""

    def run(rounds: int) -> None:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(3, 4), nn.SiLU(), nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 1))
        plain, x = copy.deepcopy(network), torch.randn(rounds, 5, 3)

        def loss(D, images: Tensor) -> Tensor:
            logits = D(images.requires_grad_())
            return logits.exp().mean() + second_order.gradient(logits.sum(), images).square().sum()

        player = PlayerSettings("D", Optimizer(), WeightPenalty(), {})
        engine = Fsdp2Engine(network, player, alone, BatchShape(1, rounds, 5))
        other = Fsdp2Engine(nn.Linear(1, 1), player, alone, BatchShape(1, rounds, 5))
        for update in range(2):
            with engine.updating(other, twice=True):
                for number, images in enumerate(x.clone()):
                    with engine.accumulating(last=number == rounds - 1):
                        engine.backward(loss(engine, images))
                engine.collect_gradients()
                plain.zero_grad()
                sum(loss(plain, images) for images in x.clone()).div(rounds).backward()
                for name, parameter in plain.named_parameters():
                    found = engine._masters[name].grad
                    torch.testing.assert_close(found, parameter.grad, msg=f"{name} in update {update}")

    return run


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_double_backward_ends_before_blocks_reduce(differentiate, rounds):
    """On a CPU, and where a device's thread makes the nodes of the gradient."""
    differentiate(rounds)
    with device_thread():
        differentiate(rounds)


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_gradient_that_is_not_reduced_ends_the_training(differentiate, rounds):
    """As it would be on a GPU by itself."""
    with device_thread(known=False), pytest.raises(AssertionError, match=r"not reduced .* 4.weight"):
        differentiate(rounds)
