"""Which parameters a weight penalty covers."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from pipeline.config import UserError, WeightPenalty
from pipeline.gan.dcgan import Discriminator, Generator
from pipeline.gan.penalised import check_penalty, penalised_names


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
    assert penalised_names(Mixed(), "weights") == {"conv.weight", "up.weight", "first.weight"}


def test_all_is_every_parameter_once():
    names = penalised_names(Mixed(), "all")
    assert names == {name for name, _ in Mixed().named_parameters()}
    assert {"embed.weight", "scale", "first.bias", "norms.0.weight", "first.weight"} <= names
    assert "second.weight" not in names


def test_a_kernel_tied_to_an_embedding_is_a_kernel_under_its_first_name():
    module = Mixed()
    module.tied = nn.Linear(6, 5)
    module.tied.weight = module.embed.weight
    assert penalised_names(module, "weights") == {"embed.weight", "conv.weight", "up.weight", "first.weight"}


def test_parametrized_kernels_and_an_undisturbed_power_iteration():
    layer = parametrizations.spectral_norm(nn.Linear(4, 4))
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    assert penalised_names(layer, "weights") == {"parametrizations.weight.original"}
    assert all(torch.equal(before[name], buffer) for name, buffer in layer.named_buffers())
    weight_norm = parametrizations.weight_norm(nn.Conv2d(1, 2, 3))
    assert penalised_names(weight_norm, "weights") == {
        "parametrizations.weight.original0",
        "parametrizations.weight.original1",
    }


def test_older_spectral_norm_and_attention():
    assert penalised_names(nn.utils.spectral_norm(nn.Conv2d(1, 2, 3)), "weights") == {"weight_orig"}
    attention = nn.MultiheadAttention(4, 2)
    assert penalised_names(attention, "weights") == {"in_proj_weight", "out_proj.weight"}


def test_dcgan():
    D = Discriminator(size=28, channels=1, num_classes=3, width=4)
    assert penalised_names(D, "weights") == {
        "blocks.0.conv.weight",
        "blocks.1.conv.weight",
        "to_logit.weight",
    }
    G = Generator(z_dim=4, size=28, channels=1, num_classes=3, width=4, norm="none")
    assert penalised_names(G, "weights") == {"project.weight", "blocks.0.conv.weight", "blocks.1.conv.weight"}
    D = Discriminator(size=28, channels=1, num_classes=3, width=4, spectral_norm=True)
    original = "parametrizations.weight.original"
    assert penalised_names(D, "weights") == {f"blocks.{i}.conv.{original}" for i in (0, 1)} | {
        f"to_logit.{original}"
    }


def test_a_penalty_that_covers_nothing_is_refused():
    network = nn.Sequential(nn.Embedding(3, 4), nn.BatchNorm1d(4))

    def check(on: str, penalty: WeightPenalty) -> None:
        check_penalty("D", network, penalty, penalised_names(network, on))

    check("all", WeightPenalty(l2=1e-3)), check("weights", WeightPenalty())
    for penalty in (WeightPenalty(l2=1e-3), WeightPenalty(l1=1e-3)):
        with pytest.raises(UserError, match=r"penalty\.D covers nothing.*penalty\.on=all"):
            check("weights", penalty)
    network.append(nn.Linear(4, 1))
    check("weights", WeightPenalty(l2=1e-3))
    network[2].requires_grad_(False)  # a constant has no gradient
    with pytest.raises(UserError, match="covers nothing"):
        check("weights", WeightPenalty(l2=1e-3))
