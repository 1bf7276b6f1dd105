"""DCGAN: the classic's size, every size and norm, labels, options, and a start that can learn."""

import math

import pytest
import torch
from torch import nn

from pipeline.config import UserError
from pipeline.gan.dcgan import SIZES, Discriminator, Generator
from pipeline.gan.penalised import penalised
from pipeline.gan.r3gan import Block


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_parameter_counts_of_the_classic():
    assert count(Generator(z_dim=100, size=64, channels=3, width=64)) == 3_576_704
    assert count(Discriminator(size=64, channels=3, width=64)) == 2_765_568


@pytest.mark.parametrize(
    ("size", "norm"), [*((s, "batch") for s in SIZES), (32, "group"), (28, "instance"), (64, "none")]
)
@pytest.mark.parametrize("num_classes", [0, 3])
def test_shapes_and_gradients(size, norm, num_classes):
    torch.manual_seed(0)
    G = Generator(z_dim=6, size=size, channels=1, num_classes=num_classes, width=4, norm=norm)
    D = Discriminator(size=size, channels=1, num_classes=num_classes, width=4, norm=norm)
    c = torch.tensor([0, 1, 2, 1]) if num_classes else None
    images = G(torch.randn(4, 6), c)
    assert images.shape == (4, 1, size, size) and images.dtype == torch.float32 and images.abs().max() <= 1
    logits = D(images, c)
    assert logits.shape == (4,)
    logits.square().sum().backward()
    for name, p in [*G.named_parameters(), *D.named_parameters()]:
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, name


@pytest.mark.parametrize("size", [0, 1, 27, 48, 256])
@pytest.mark.parametrize("player", ["G", "D"])
def test_a_size_that_does_not_exist_names_those_that_do(size, player):
    with pytest.raises(UserError, match="28, 32, 64, 128"):
        if player == "G":
            Generator(z_dim=4, size=size, channels=3)
        else:
            Discriminator(size=size, channels=3)


def test_width_doubles_inwards_up_to_eightfold():
    D = Discriminator(size=128, channels=3, width=4)
    assert [block.conv.out_channels for block in D.blocks] == [4, 8, 16, 32, 32]
    G = Generator(z_dim=4, size=128, channels=3, width=4)
    assert [block.conv.in_channels for block in G.blocks] == [32, 32, 16, 8, 4]


def test_biases_only_without_norms_and_norms_neither_first_nor_last():
    for norm, layer in (("batch", nn.BatchNorm2d), ("group", nn.GroupNorm), ("instance", nn.InstanceNorm2d)):
        D = Discriminator(size=64, channels=3, width=8, norm=norm)
        G = Generator(z_dim=4, size=64, channels=3, width=8, norm=norm)
        assert all(m.bias is None for net in (G, D) for m in net.modules() if hasattr(m, "kernel_size"))
        assert [isinstance(block.norm, layer) for block in D.blocks] == [False, True, True, True]
        assert all(isinstance(block.norm, layer) for block in G.blocks)  # each before its convolution
    D = Discriminator(size=64, channels=3, width=8, norm="none")
    assert all(m.bias is not None for m in D.modules() if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize("channels", [1, 2, 6, 12, 36, 512])
def test_group_norm_finds_groups_for_any_width(channels):
    D = Discriminator(size=28, channels=1, width=max(1, channels // 2), norm="group")
    assert D(torch.randn(2, 1, 28, 28)).isfinite().all()


def test_dropout_between_hidden_layers_only():
    G = Generator(z_dim=4, size=64, channels=3, width=4, dropout=0.3)
    assert [block.dropout.p for block in G.blocks] == [0.3, 0.3, 0.3, 0.0]
    D = Discriminator(size=64, channels=3, width=4, dropout=0.3).train()
    x = torch.randn(2, 3, 64, 64)
    assert not torch.equal(D(x), D(x))
    D.eval()
    assert torch.equal(D(x), D(x))


def test_spectral_norm_bounds_every_kernel_of_both():
    torch.manual_seed(0)
    G = Generator(z_dim=4, size=32, channels=3, num_classes=2, width=4, spectral_norm=True)
    D = Discriminator(size=32, channels=3, num_classes=2, width=4, spectral_norm=True)
    c = torch.tensor([0, 1])
    for _ in range(30):  # a power iteration each
        D(G(torch.randn(2, 4), c), c)
    G.eval(), D.eval()
    layers = [*(b.conv for b in G.blocks), G.project, *(b.conv for b in D.blocks), D.to_logit, D.embed]
    for layer in layers:
        rows = layer.weight.transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) else layer.weight
        assert torch.linalg.matrix_norm(rows.flatten(1), 2).item() == pytest.approx(1, abs=0.02)


def test_labels_matter_to_both_players():
    torch.manual_seed(0)
    G = Generator(z_dim=4, size=32, channels=1, num_classes=2, width=4, norm="none")
    D = Discriminator(size=32, channels=1, num_classes=2, width=4, norm="none")
    z, x = torch.randn(1, 4), torch.randn(1, 1, 32, 32)
    zero, one = torch.tensor([0]), torch.tensor([1])
    assert not torch.allclose(G(z, zero), G(z, one))
    assert not torch.allclose(D(x, zero), D(x, one))


def test_projection_is_the_inner_product_of_embedding_and_pooled_features():
    """Miyato & Koyama 2018, eq. 3: logit = y·V φ(x) + ψ(φ(x))."""
    torch.manual_seed(0)
    D = Discriminator(size=32, channels=1, num_classes=3, width=4, norm="none")
    x, c = torch.randn(5, 1, 32, 32), torch.tensor([0, 1, 2, 1, 0])
    phi = D.blocks(x)
    expected = D.to_logit(phi).flatten() + torch.einsum("nc,nchw->n", D.embed.weight[c], phi)
    torch.testing.assert_close(D(x, c), expected)


def test_initialisation_of_the_paper_under_batch_norm():
    torch.manual_seed(0)
    for net in (Generator(z_dim=100, size=64, channels=3), Discriminator(size=64, channels=3)):
        for layer in net.modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
                assert abs(layer.weight.mean().item()) < 0.001


@pytest.mark.parametrize("norm", ["group", "instance", "none"])
@pytest.mark.parametrize("width", [8, 32])
def test_other_starts_neither_vanish_nor_saturate(norm, width):
    torch.manual_seed(0)
    G = Generator(z_dim=64, size=64, channels=3, width=width, norm=norm)
    D = Discriminator(size=64, channels=3, width=width, norm=norm)
    images = G(torch.randn(16, 64))
    assert 0.2 < images.std(0).mean().item() < 0.8, "images of different z must differ, tanh not be saturated"
    logits = D(torch.rand(16, 3, 1, 1) * torch.randn(16, 3, 64, 64))
    assert 0.02 < logits.std().item() < 3


# With blocks of R3GAN


def test_without_norms_the_layer_of_z_starts_as_before_and_learns_at_the_convolutions_pace():
    torch.manual_seed(0)
    shape = {"z_dim": 64, "size": 28, "channels": 1, "width": 32, "norm": "none"}
    G, plain = Generator(blocks=1, **shape), Generator(**shape)
    z = torch.randn(32, 64)
    assert G.project.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert G.project(z).std().item() == pytest.approx(plain.project(z).std().item(), rel=0.05)
    factors = penalised(G, "auto")
    assert factors.pop("project.weight") == pytest.approx(math.sqrt(2 / 64) / 0.02)
    assert set(factors.values()) == {1.0}
    step = 0.001
    before, (weights, biases) = G.project(z), (G.project.weight, G.project.bias)
    with torch.no_grad():
        weights.add_(step), biases.add_(step)
    moved = math.sqrt(2 / 64) / 0.02 * step * (z.sum(1, keepdim=True) + 1)
    torch.testing.assert_close(G.project(z) - before, moved.expand_as(before), atol=1e-5, rtol=0)
    assert type(Generator(blocks=1, **shape | {"norm": "batch"}).project) is nn.Linear  # which has norms


def hybrid(blocks, size=28, **options):
    torch.manual_seed(0)
    shared = {"size": size, "channels": 1, "width": 8, "blocks": blocks} | options
    return Generator(z_dim=6, **shared), Discriminator(**shared | {"norm": "none"})


@pytest.mark.parametrize(("size", "smallest"), [(28, 7), (64, 4)])
def test_blocks_are_at_its_smallest_resolution(size, smallest):
    G, D = hybrid(2, size)
    seen = []
    for network in (G, D):
        for layer in network.modules():
            if isinstance(layer, Block):
                layer.register_forward_hook(lambda _m, _i, out: seen.append(out.shape[-1]))
    assert D(G(torch.randn(2, 6))).shape == (2,)
    assert seen == [smallest] * 4
    assert isinstance(G.blocks[0], Block) and isinstance(D.blocks[-1], Block)


def test_a_new_pair_with_blocks_is_the_one_without():
    x, z = torch.randn(2, 1, 28, 28), torch.randn(2, 6)
    with_blocks, without = hybrid(1), hybrid(0)
    for network, other, given in zip(with_blocks, without, (z, x), strict=True):
        weights = [p for layer in network.blocks if not isinstance(layer, Block) for p in layer.parameters()]
        with torch.no_grad():
            for p, q in zip(weights, other.blocks.parameters(), strict=True):
                p.copy_(q)
            for name, p in network.named_parameters():
                if not name.startswith("blocks."):
                    p.copy_(dict(other.named_parameters())[name])
        assert torch.equal(network(given), other(given))
        assert count(network) > count(other)


def test_a_block_begins_as_in_r3gan():
    for network in hybrid(1, width=64):
        (found,) = [m for m in network.modules() if isinstance(m, Block)]
        he = math.sqrt(2 / 1.04 / found.expand.in_channels)
        assert found.expand.weight.std().item() == pytest.approx(he, rel=0.1)
        assert not found.reduce.weight.any() and not found.mix.bias.any()
