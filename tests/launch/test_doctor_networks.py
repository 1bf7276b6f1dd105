"""What doctor works out from the networks: FLOPs, and where a weight penalty acts on the function."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.flop_counter import FlopCounterMode

from launch.doctor import alone, flops, memory, networks, scale
from launch.doctor.finding import Job
from pipeline.config import load
from pipeline.gan.penalised import penalised

EXACT = ["penalty.r1.gamma=1", "penalty.r1.interval=1", "penalty.r2.gamma=1"]
DIFFERENCE = [*EXACT, "penalty.r1.sigma=0.1", "penalty.r2.sigma=0.1", "penalty.r2.sided=1"]
QUARTER = ["penalty.r1.fraction=1/4", "penalty.r2.fraction=1/4"]
FROZEN = ["D.kind=resnet", "D.width=8", "D.freeze=1"]
CHECKPOINTED = [f"{player}.{key}" for player in "GD" for key in ("kind=resnet", "width=8", "checkpoint=true")]

_OF_STYLEGAN2 = ("kind=stylegan2", "checkpoint=true", "norm=batch")
STYLEGAN2 = [f"{player}.{key}" for player in "GD" for key in _OF_STYLEGAN2]


def config(*settings):
    common = ["data.train=x", "data.size=32", "G.norm=none", "D.norm=none", "G.width=16", "D.width=16"]
    return load(None, [*common, *settings])


def counted(settings, images=8):
    """Of one update on tensors without memory, every operation of which is seen; per image."""
    with FakeTensorMode(), patch.object(nn.Module, "_apply", memory.convert_without_memory):
        update, _ = alone.second_update(settings, images, "no", 0)
        with FlopCounterMode(display=False) as seen:
            seen.mod_tracker.__exit__(None, None, None)  # cannot follow a second derivative
            update()
            seen.mod_tracker.__enter__()
    return seen.get_total_flops() / images


def test_a_forward_pass_is_that_of_its_layers():
    """28 px, width 4: z [7] → 8·7², 8 → 4 → 1 channels; D the reverse. Two per multiply-add."""
    small = config("data.size=28", "data.channels=1", "G.z_dim=7", "G.width=4", "D.width=4")
    G = 7 * 8 * 49 + 16 * 8 * 4 * 7**2 + 16 * 4 * 1 * 14**2
    D = 16 * 1 * 4 * 14**2 + 16 * 4 * 8 * 7**2 + 8 * 49
    assert flops.forward(small, 0) == (2 * G, 2 * D, 0)


def test_stylegan2_takes_what_is_counted_by_hand():
    """29.8 and 30.8 GFLOP at 256 px; its modulated convolutions get a parameter as an input."""
    asked = load(None, ["data.train=x", "data.size=256", "G.kind=stylegan2", "D.kind=stylegan2"])
    assert [round(found / 1e9, 1) for found in flops.forward(asked, 0)[:2]] == [29.8, 30.8]


@pytest.mark.parametrize(
    "settings",
    [
        ("loss.kind=relativistic", *EXACT),
        (*EXACT, *QUARTER, "penalty.wgan_gp.weight=1"),
        (*DIFFERENCE, *QUARTER),
        CHECKPOINTED,
        FROZEN,
        (*FROZEN, *EXACT),
        (*FROZEN, *EXACT, *QUARTER, "penalty.wgan_gp.weight=1"),
        (*FROZEN, *DIFFERENCE, "D.checkpoint=true"),
        (*CHECKPOINTED, *EXACT),
        (*CHECKPOINTED, *EXACT, *QUARTER, "penalty.wgan_gp.weight=1"),
        (*FROZEN, *EXACT, "D.checkpoint=true"),
        (*FROZEN, *EXACT, *QUARTER, "D.checkpoint=true"),
        (*STYLEGAN2, *EXACT),
        (*STYLEGAN2, "penalty.path.weight=1", "penalty.path.interval=1"),
        (*STYLEGAN2, *EXACT, "D.freeze=1"),
    ],
)
def test_training_is_what_an_update_does(settings):
    """Less its first layers, which need no gradient of their input."""
    asked = config(*settings)
    found = flops.of_training(asked, *flops.forward(asked, 0))
    assert counted(asked) <= found * 1.001 and found < 1.08 * counted(asked)


def test_lazy_penalties_and_several_steps_are_averaged():
    def k(*settings):  # G's and D's forward passes, counted apart
        asked = config(*settings)
        return flops.of_training(asked, 1, 0), flops.of_training(asked, 0, 1)

    assert k() == (4, 8) and k("loss.kind=relativistic", *EXACT) == (4, 15)
    assert k("penalty.r1.gamma=1") == (4, 8 + 3 / 16)
    assert k("penalty.path.weight=2") == (4.75, 8)
    assert k("loss.D_steps=2") == (1 + 3 / 2, 6 + 2 / 2)
    again = ("G.kind=stylegan2", "D.kind=stylegan2", "G.checkpoint=true", "D.checkpoint=true")
    assert k(*again, "penalty.r1.gamma=1", "penalty.path.weight=2") == (1 + 4 + 4 / 4, 8 + 3 + 4 / 16)
    assert k(*again, "penalty.wgan_gp.weight=2") == (1 + 4, 8 + 3 + 8)


def test_a_number_of_flops_is_readable():
    assert [flops.in_flops(n) for n in (5.45e7, 1.5e9, 2.371e12, 100)] == [
        "54.5 MFLOP", "1.5 GFLOP", "2.37 TFLOP", "0.0001 MFLOP"
    ]  # fmt: skip


class Demodulated(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(
            x, self.weight / (self.weight.square().sum(1, keepdim=True) + 1e-8).sqrt()
        )


def test_kernels_whose_scale_does_not_matter_are_found():
    """A skip connection keeps the scale of what it adds; what follows a kernel of 0 is seen too."""
    block = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.LeakyReLU(0.2), nn.Linear(8, 8))
    nn.init.zeros_(block[3].weight)

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.block, self.plain = nn.Linear(4, 8), block, nn.Linear(8, 8)
            self.demodulated, self.spectral = Demodulated(8, 8), spectral_norm(nn.Linear(8, 8))
            self.weighed = weight_norm(nn.Linear(8, 3))

        def forward(self, x):
            x = self.first(x)
            return self.weighed(self.spectral(self.demodulated(self.plain(x + self.block(x)).relu())))

    network = Network()
    for layer in (block[0], network.plain):
        nn.init.zeros_(layer.bias)
    names = penalised(network, "weights")
    original = "parametrizations.weight.original"
    assert scale.undone(network, names, (torch.randn(4, 4).double(),)) == [
        "block.0.weight", "demodulated.weight", f"spectral.{original}", f"weighed.{original}1"
    ]  # fmt: skip


def test_a_finding_for_each_player_with_a_penalty():
    def found(*settings, cost=(1.0, 1.0)):
        asked = Job(config(*settings), 1, 1, "single", "no")
        return [*scale.examine(asked, 0, networks.build_players(asked, 0), cost)]

    assert not found()
    G, D = found("penalty.l2=[1,0]", "run.burn_in_kimg=1", "D.norm=batch", "D.spectral_norm=true")
    assert (G.verdict, D.verdict) == ("ok", "warning") and "D.norm=none" in D.remedy
    assert "λ_D on weights" in D.text and "(blocks.0.conv, blocks.1.conv, blocks.2.conv and 1 more)" in D.text
    (large,) = found("penalty.D.l1=1", cost=(1e12, 1e12))
    assert large.verdict == "ok" and "too large to try" in large.text
    (uncounted,) = found("penalty.D.l1=1", "D.norm=batch", cost=None)
    assert uncounted.verdict == "warning" and "undoes the scale" in uncounted.text
    kinds = [
        f"{p}.kind=launch.selfcheck.networks:Equalised{who}"
        for p, who in (("G", "Generator"), ("D", "Discriminator"))
    ]
    assert "λ_G on effective acts" in found("penalty.l2=1", "data.channels=1", *kinds)[0].text


def test_what_is_too_large_or_breaks_is_not_built_here(monkeypatch):
    asked = Job(config("penalty.D.l1=1"), 1, 1, "single", "no")
    players = networks.build_players(asked, 0)

    def found(cost):
        (finding,) = scale.examine(asked, 0, players, cost)
        return finding.text

    def refuse(*_):
        raise MemoryError("no room")

    monkeypatch.setattr(scale, "build_D", refuse)
    assert "too large to try" in found((1e12, 1e12)) and "not tried" in found((1.0, 1.0))
    monkeypatch.setattr(scale, "_LARGEST", 10)
    assert "too large to try" in found(None)
