"""Residual networks: shapes at every size, how large they get, labels, and a start that can learn."""

import copy

import pytest
import torch
from torch import nn

from pipeline.config import UserError, load
from pipeline.gan.networks import build_D, build_G, check_networks
from pipeline.gan.penalised import penalised
from pipeline.gan.resnet import SIZES, Discriminator, Generator, Residual


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def pair(size=32, channels=1, num_classes=0, width=4, **options):
    torch.manual_seed(0)
    shared = {"size": size, "channels": channels, "num_classes": num_classes, "width": width} | options
    return Generator(z_dim=6, **shared), Discriminator(**shared)


@pytest.mark.parametrize(
    ("size", "norm", "depth"),
    [*((s, "batch", 1) for s in SIZES), (32, "group", 2), (32, "instance", 1), (64, "none", 3)],
)
@pytest.mark.parametrize("num_classes", [0, 3])
def test_shapes_and_gradients(size, norm, depth, num_classes):
    G, D = pair(size, num_classes=num_classes, norm=norm, depth=depth)
    c = torch.tensor([0, 1, 2, 1]) if num_classes else None
    images = G(torch.randn(4, 6), c)
    assert images.shape == (4, 1, size, size) and images.dtype == torch.float32 and images.abs().max() <= 1
    logits = D(images, c)
    assert logits.shape == (4,)
    logits.square().sum().backward()
    for name, p in [*G.named_parameters(), *D.named_parameters()]:
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, name


def test_one_image_gives_one_logit():
    _, D = pair(norm="none")
    assert D(torch.randn(1, 1, 32, 32)).shape == (1,)


@pytest.mark.parametrize("size", [0, 28, 48, 512])
@pytest.mark.parametrize("player", [0, 1])
def test_a_size_that_does_not_exist_names_those_that_do(size, player):
    with pytest.raises(UserError, match="32, 64, 128, 256"):
        Discriminator(size=size, channels=3) if player else Generator(z_dim=4, size=size, channels=3)


@pytest.mark.parametrize(("size", "width"), [(32, 288), (64, 176)])
def test_past_fifty_million_parameters_each(size, width):
    with torch.device("meta"):
        G = Generator(z_dim=128, size=size, channels=3, width=width)
        D = Discriminator(size=size, channels=3, width=width)
    assert 50e6 < count(D) < count(G) < 60e6


def test_a_block_is_the_size_it_says():
    """Two kernels of 3×3, a 1×1 on the way past where channels change; no biases beside norms."""
    changing = Residual(8, 4, "batch", resample="up")
    assert count(changing) == 9 * (8 * 4 + 4 * 4) + 8 * 4 + 2 * (8 + 4)
    keeping = Residual(8, 8, "none")
    assert count(keeping) == 2 * (9 * 8 * 8 + 8) and not list(keeping.match.parameters())


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_depth_is_blocks_per_resolution(depth):
    for network in pair(size=64, depth=depth):
        resolutions = 4 if isinstance(network, Generator) else 5  # 4×4 has blocks of its own in D
        assert sum(isinstance(m, Residual) for m in network.blocks) == depth * resolutions


def test_blocks_can_be_sharded_one_by_one():
    """All but a few parameters are in the entries of one sequence, and none holds nearly all of them."""
    for network in pair(size=64, width=16):
        sizes = [count(block) for block in network.blocks]
        assert sum(sizes) > 0.85 * count(network) and max(sizes) < 0.7 * count(network)


def test_every_tensor_has_one_name():
    for network in pair(num_classes=3):
        assert network.state_dict().keys() == {
            *dict(network.named_parameters()), *dict(network.named_buffers())
        }  # fmt: skip


def test_the_shortcut_passes_an_image_on_at_another_size():
    x = torch.randn(2, 4, 8, 8)
    up, down = Residual(4, 4, "none", resample="up"), Residual(4, 4, "none", resample="down")
    for block in (up, down):
        nn.init.zeros_(block.conv2.weight), nn.init.zeros_(block.conv2.bias)
    torch.testing.assert_close(up(x), x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    torch.testing.assert_close(down(x), x.unflatten(2, (4, 2)).unflatten(4, (4, 2)).mean((3, 5)))


def test_the_first_block_of_d_sees_the_image_unrectified():
    _, D = pair(norm="batch")
    first, second = D.blocks[:2]
    assert isinstance(first.norm1, nn.Identity) and isinstance(first.activation1, nn.Identity)
    assert isinstance(second.norm1, nn.BatchNorm2d) and isinstance(second.activation1, nn.ReLU)


def test_penalised_are_the_kernels_and_nothing_else():
    for network in pair(num_classes=3, norm="batch", depth=2):
        kernels = {
            f"{name}.weight"
            for name, layer in network.named_modules()
            if isinstance(layer, nn.Conv2d | nn.Linear)
        }
        assert penalised(network, "weights").keys() == kernels
        assert not any("norm" in name or "embed" in name or "bias" in name for name in kernels)
    for network in pair(spectral_norm=True, norm="none", num_classes=3):
        assert all(name.endswith("weight.original") for name in penalised(network, "weights"))


def test_projection_is_the_inner_product_of_embedding_and_pooled_features():
    """Miyato & Koyama 2018, eq. 3: logit = y·V φ(x) + ψ(φ(x))."""
    _, D = pair(num_classes=3, norm="none")
    x, c = torch.randn(5, 1, 32, 32), torch.tensor([0, 1, 2, 1, 0])
    phi = D.blocks(x).sum((2, 3))
    expected = D.to_logit(phi)[:, 0] + (D.embed.weight[c] * phi).sum(1)
    torch.testing.assert_close(D(x, c), expected)


def test_labels_matter_to_g():
    G, _ = pair(num_classes=2, norm="none")
    z = torch.randn(1, 6)
    assert not torch.allclose(G(z, torch.tensor([0])), G(z, torch.tensor([1])))


def test_spectral_norm_bounds_every_kernel_of_both():
    G, D = pair(num_classes=2, spectral_norm=True, norm="group")
    c = torch.tensor([0, 1])
    for _ in range(30):  # a power iteration each
        D(G(torch.randn(2, 6), c), c)
    G.eval(), D.eval()
    layers = [m for n in (G, D) for m in n.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for layer in [*layers, D.embed]:
        norm = torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item()
        assert norm == pytest.approx(1, abs=0.03)


def test_dropout_in_training_only():
    _, D = pair(dropout=0.3, norm="none")
    x = torch.randn(2, 1, 32, 32)
    assert not torch.equal(D(x), D(x))
    D.eval()
    assert torch.equal(D(x), D(x))


@pytest.mark.parametrize("norm", ["batch", "group", "instance", "none"])
@pytest.mark.parametrize("depth", [1, 4])
def test_the_start_neither_vanishes_nor_saturates(norm, depth):
    torch.manual_seed(0)
    G = Generator(z_dim=64, size=32, channels=3, width=16, depth=depth, norm=norm)
    D = Discriminator(size=32, channels=3, width=16, depth=depth, norm=norm)
    images = G(torch.randn(16, 64))
    assert 0.2 < images.std(0).mean().item() < 0.8, "images of different z must differ, tanh not be saturated"
    logits = D(torch.rand(16, 3, 1, 1) * torch.randn(16, 3, 32, 32))
    assert 0.01 < logits.std().item() < 3


def test_without_a_norm_depth_does_not_blow_features_up():
    torch.manual_seed(0)
    D = Discriminator(size=32, channels=3, width=16, depth=8, norm="none")
    x = torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        growth = D.blocks[:-1](x).var() / D.blocks[:1](x).var()
    assert 0.1 < growth < 10


def test_double_backward_through_d():
    """R1 differentiates the gradient with respect to images."""
    _, D = pair(norm="none")
    x = torch.randn(2, 1, 32, 32, requires_grad=True)
    (gradient,) = torch.autograd.grad(D(x).sum(), x, create_graph=True)
    gradient.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in D.parameters())
    assert D.blocks[0].conv1.weight.grad.abs().sum() > 0


def test_it_learns_to_tell_two_images_apart():
    G, D = pair(norm="none", width=8)
    before = copy.deepcopy(D.state_dict())
    optimizer = torch.optim.Adam(D.parameters(), lr=1e-3)
    with torch.no_grad():
        x = torch.cat([G(torch.randn(8, 6)), torch.rand(8, 1, 32, 32) * 2 - 1])
    sign = torch.tensor([1.0] * 8 + [-1.0] * 8)
    for _ in range(15):
        optimizer.zero_grad()
        nn.functional.softplus(-sign * D(x)).mean().backward()
        optimizer.step()
    assert (sign * D(x)).min() > 0 and not torch.equal(before["to_logit.weight"], D.to_logit.weight)


def config(*settings: str):
    small = ["data.train=x", "G.width=4", "D.width=4", "G.z_dim=8", "G.kind=resnet", "D.kind=resnet"]
    return load(None, [*small, *settings])


def test_from_the_config_with_a_seed_of_its_own():
    settings = config("G.depth=2", "D.depth=3", "D.norm=none")
    check_networks(settings, 0)
    G, D = build_G(settings, 0), build_D(settings, 0)
    assert sum(isinstance(m, Residual) for m in G.blocks) == 6
    assert sum(isinstance(m, Residual) for m in D.blocks) == 12
    torch.manual_seed(99)
    again = build_G(settings, 0)
    assert all(torch.equal(a, b) for a, b in zip(G.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("player", ["G", "D"])
def test_depth_is_refused_where_it_means_nothing(player):
    with pytest.raises(UserError, match=rf"{player}\.depth=2: dcgan does not take it"):
        check_networks(config(f"{player}.kind=dcgan", f"{player}.depth=2"), 0)


def test_a_size_beyond_them_is_refused_before_anything_starts():
    with pytest.raises(UserError, match=r"data\.size=28: resnet .* 32, 64, 128, 256"):
        check_networks(config("data.size=28"), 0)
