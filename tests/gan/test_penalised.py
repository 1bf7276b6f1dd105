"""Which parameters a weight penalty covers."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from pipeline.config import UserError, WeightPenalty
from pipeline.gan.dcgan import Discriminator, Generator
from pipeline.gan.penalised import check_penalty, penalised, resolved


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 6)
        self.conv = nn.Conv1d(2, 3, 3)
        self.up = nn.ConvTranspose3d(3, 2, 2)
        self.norms = nn.ModuleList([nn.BatchNorm1d(3), nn.LayerNorm(3), nn.GroupNorm(1, 3)])
        self.activation = nn.PReLU()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.scale = nn.Parameter(torch.ones(1))


def test_kernels_and_nothing_else():
    assert penalised(Mixed(), "weights").keys() == {"conv.weight", "up.weight", "first.weight"}


def test_all_is_every_parameter_once():
    names = penalised(Mixed(), "all")
    assert names.keys() == {name for name, _ in Mixed().named_parameters()}
    assert {"embed.weight", "scale", "first.bias", "norms.0.weight", "first.weight"} <= names.keys()
    assert "second.weight" not in names


def test_a_kernel_tied_to_an_embedding_is_a_kernel_under_its_first_name():
    module = Mixed()
    module.tied = nn.Linear(6, 5)
    module.tied.weight = module.embed.weight
    assert penalised(module, "weights").keys() == {"embed.weight", "conv.weight", "up.weight", "first.weight"}


def test_parametrized_kernels_and_an_undisturbed_power_iteration():
    layer = parametrizations.spectral_norm(nn.Linear(4, 4))
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    assert penalised(layer, "weights").keys() == {"parametrizations.weight.original"}
    assert all(torch.equal(before[name], buffer) for name, buffer in layer.named_buffers())
    weight_norm = parametrizations.weight_norm(nn.Conv2d(1, 2, 3))
    assert penalised(weight_norm, "weights").keys() == {
        "parametrizations.weight.original0",
        "parametrizations.weight.original1",
    }


def test_older_spectral_norm_and_attention():
    assert penalised(nn.utils.spectral_norm(nn.Conv2d(1, 2, 3)), "weights").keys() == {"weight_orig"}
    attention = nn.MultiheadAttention(4, 2)
    assert penalised(attention, "weights").keys() == {"in_proj_weight", "out_proj.weight"}


def test_dcgan():
    D = Discriminator(size=28, channels=1, num_classes=3, width=4)
    assert penalised(D, "weights").keys() == {
        "blocks.0.conv.weight",
        "blocks.1.conv.weight",
        "to_logit.weight",
    }
    G = Generator(z_dim=4, size=28, channels=1, num_classes=3, width=4, norm="none")
    assert penalised(G, "weights").keys() == {
        "project.weight",
        "blocks.0.conv.weight",
        "blocks.1.conv.weight",
    }
    D = Discriminator(size=28, channels=1, num_classes=3, width=4, spectral_norm=True)
    original = "parametrizations.weight.original"
    assert penalised(D, "weights").keys() == {f"blocks.{i}.conv.{original}" for i in (0, 1)} | {
        f"to_logit.{original}"
    }


def test_a_penalty_that_covers_nothing_is_refused():
    network = nn.Sequential(nn.Embedding(3, 4), nn.BatchNorm1d(4))

    def check(on: str, penalty: WeightPenalty) -> None:
        check_penalty("D", network, penalty, penalised(network, on))

    check("all", WeightPenalty(l2=1e-3)), check("weights", WeightPenalty())
    for penalty in (WeightPenalty(l2=1e-3), WeightPenalty(l1=1e-3)):
        with pytest.raises(UserError, match=r"penalty\.D covers nothing.*penalty\.on=all"):
            check("weights", penalty)
    network.append(nn.Linear(4, 1))
    check("weights", WeightPenalty(l2=1e-3))
    network[2].requires_grad_(False)  # a constant has no gradient
    with pytest.raises(UserError, match="covers nothing"):
        check("weights", WeightPenalty(l2=1e-3))


class Scaled(nn.Module):
    """A kernel layer that is neither a convolution nor linear."""

    def __init__(self, gain: object, out: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(out, 2))
        self.bias = nn.Parameter(torch.ones(out))
        self.weight_gain = gain


def test_effective_is_the_kernels_with_their_layers_constant():
    module = nn.Sequential(Scaled(0.5), nn.Linear(3, 2), Scaled(2), nn.Embedding(2, 2))
    module[1].weight_gain = np.float32(0.25)
    kernels = ["0.weight", "1.weight", "2.weight"]
    assert penalised(module, "effective") == dict(zip(kernels, (0.5, 0.25, 2.0), strict=True))
    assert penalised(module, "weights") == dict.fromkeys(kernels, 1.0)
    assert penalised(module, "all") == {name: 1.0 for name, _ in module.named_parameters()}
    normalised = parametrizations.spectral_norm(nn.Linear(4, 4))
    normalised.weight_gain = 0.5  # of the stored kernel; the norm's own factor changes
    assert penalised(normalised, "effective") == {"parametrizations.weight.original": 0.5}


@pytest.mark.parametrize(
    ("gains", "meant"), [((), "weights"), ((1.0, 1), "weights"), ((1, 0.5), "effective")]
)
def test_auto_is_effective_for_a_player_with_a_gain(gains, meant):
    module = nn.Sequential(nn.Linear(2, 2), *map(Scaled, gains))
    assert resolved(module, "auto") == meant
    assert penalised(module, "auto") == penalised(module, meant)
    assert resolved(module, "all") == "all"


@pytest.mark.parametrize(
    "gain", [[0.5, 0.5], torch.tensor(0.5), 0.0, -1.0, float("inf"), float("nan"), None, "1"]
)
@pytest.mark.parametrize("on", ["auto", "effective"])
def test_a_gain_is_one_positive_number(gain, on):
    module = nn.Sequential(nn.Linear(2, 2), Scaled(gain))
    with pytest.raises(UserError, match=r"1\.weight_gain is .*one positive number.*penalty\.on=weights"):
        penalised(module, on)
    assert penalised(module, "weights").keys() == {"0.weight", "1.weight"}


def test_a_gain_without_a_kernel_is_refused():
    """Its layers' own constants would be missed."""
    outer = nn.Sequential(nn.Linear(2, 2))
    outer.weight_gain = 0.5
    with pytest.raises(UserError, match="no parameter `weight`"):
        penalised(nn.Sequential(outer), "auto")


def test_a_kernel_has_one_effective_size():
    module = nn.Sequential(Scaled(0.5), Scaled(0.5), nn.Linear(2, 3))
    module[1].weight = module[0].weight
    assert penalised(module, "effective") == {"0.weight": 0.5, "2.weight": 1.0}
    module[2].weight = module[0].weight
    with pytest.raises(UserError, match=r"2 shares its kernel .* \(1 and 0\.5\)"):
        penalised(module, "effective")
    assert penalised(module, "weights") == {"0.weight": 1.0}
