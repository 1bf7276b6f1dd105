"""D.freeze: the layers of D next to the image do not train."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.config import UserError, load
from pipeline.gan.frozen import constants_of, freeze, frozen_names
from pipeline.gan.networks import build_D, check_networks


def D_of(*settings):
    return build_D(load(None, ["data.train=x", "data.size=32", "D.width=4", *settings]), 0)


class Blockless(nn.Module):
    def __init__(self, size, channels, num_classes):
        super().__init__()
        self.layer = nn.Linear(channels * size**2, 1)

    def forward(self, x, c=None):
        return self.layer(x.flatten(1)).squeeze(1)


class OfBlocks(nn.Module):
    def __init__(self, size, channels, num_classes):
        super().__init__()
        self.from_pixels = nn.Conv2d(channels, 3, 1)
        # Entries without parameters are no blocks; the third shares the kernel of the first.
        self.blocks = nn.ModuleList([nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)])
        self.blocks[3].weight = self.blocks[0].weight
        self.to_logit = nn.Linear(3, 1)


@pytest.mark.parametrize("kind", ["dcgan", "resnet"])
def test_the_first_blocks_do_not_train_and_all_others_do(kind):
    plain, D = D_of(f"D.kind={kind}"), D_of(f"D.kind={kind}", "D.freeze=2")
    frozen = {name for name, p in D.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in plain.named_parameters() if n.startswith(("blocks.0.", "blocks.1."))}
    assert frozen == frozen_names(D, 2) == constants_of(D, 2).keys() and frozen
    assert all(p.requires_grad for p in plain.parameters()) and not frozen_names(plain, 0)
    for (name, p), (_, q) in zip(D.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(p, q), name


def test_a_transformer_s_layer_from_pixels_goes_with_its_first_block():
    D = D_of("D.kind=vit", "D.width=16", "D.heads=2", "D.depth=2", "D.freeze=1")
    frozen = {name for name, p in D.named_parameters() if not p.requires_grad}
    assert {name.split(".")[0] for name in frozen} == {"from_pixels", "blocks"}
    assert {name.split(".")[1] for name in frozen if name.startswith("blocks")} == {"0"}


def test_exact_gradient_penalties_run_through_them():
    D = D_of("D.freeze=2", "D.norm=none").double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    (slopes,) = torch.autograd.grad(D(x).sum(), x, create_graph=True)
    slopes.square().sum().backward()
    assert slopes.abs().max() > 0
    assert all(
        (p.grad is not None) == p.requires_grad for n, p in D.named_parameters() if n.endswith("weight")
    )


def test_a_group_norm_may_come_first_of_what_trains():
    """Its gradients, of images that need none, are those of images that need one."""
    D = D_of("D.kind=resnet", "D.norm=group", "D.freeze=1")
    x = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    found = []
    for images in (x, x.requires_grad_()):
        D.zero_grad()
        D(images).sum().backward()
        found.append([p.grad for p in D.parameters() if p.requires_grad])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*found, strict=True))


def test_what_comes_before_the_blocks_and_what_they_share_is_frozen():
    D = OfBlocks(32, 3, 0)
    freeze(D, 0)
    assert D.from_pixels.weight.requires_grad
    freeze(D, 1)
    assert frozen_names(D, 1) == {
        f"{layer}.{name}" for layer in ("from_pixels", "blocks.0") for name in ("weight", "bias")
    }
    assert not D.blocks[3].weight.requires_grad and D.blocks[3].bias.requires_grad
    freeze(D, 2)
    assert not D.blocks[2].weight.requires_grad and D.to_logit.weight.requires_grad


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["D.freeze=3"], "this D has 3 blocks, of which at most 2 can be frozen"),
        (["D.freeze=9"], "this D has 3 blocks"),
        (["D.freeze=1", "D.kind=test_frozen:Blockless"], "Blockless .* needs an attribute `blocks`"),
        (["D.freeze=3", "D.kind=test_frozen:OfBlocks"], "this D has 3 blocks"),
    ],
)
def test_what_cannot_be_frozen_is_refused_before_anything_starts(settings, said):
    given = load(None, ["data.train=x", "data.size=32", *settings])
    with pytest.raises(UserError, match=said):
        build_D(given, 0)
    if given.D.kind == "dcgan":
        with pytest.raises(UserError, match=said):
            check_networks(given, 0)
