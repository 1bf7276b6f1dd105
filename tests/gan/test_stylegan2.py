"""StyleGAN2 against the published counts and against a second implementation of the papers' formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config import UserError
from pipeline.gan import stylegan2
from pipeline.gan.draws import Draws, Samples
from pipeline.gan.noise import keys_of, white_noise
from pipeline.gan.path_length import path_lengths
from pipeline.gan.stylegan2 import SIZES, Discriminator, Generator

LABELS = torch.tensor([0, 2, 1, 2])
FILTER = torch.tensor([1, 3, 3, 1]).outer(torch.tensor([1, 3, 3, 1])).double() / 64


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def pair(size=28, channels=3, num_classes=3, **options) -> tuple[Generator, Discriminator]:
    """A small pair of float64, none of whose parameters is where it starts: biases and noise too."""
    torch.manual_seed(0)
    shared = {"size": size, "channels": channels, "num_classes": num_classes, "width": 3, "max_width": 5}
    G = Generator(z_dim=6, mapping=3, **(shared | options)).double()
    D = Discriminator(**(shared | options)).double()
    with torch.no_grad():
        for p in [*G.parameters(), *D.parameters()]:
            p += 0.3 * torch.randn_like(p)
    return G, D


# The second implementation: kernels of single images, zeros put between pixels, the filter as a 4×4 kernel.


def filtered(x: Tensor, before: int, after: int) -> Tensor:
    kernel = FILTER.expand(x.shape[1], 1, 4, 4)
    return F.conv2d(F.pad(x, (before, after, before, after)), kernel, groups=x.shape[1])


def spread_out(x: Tensor) -> Tensor:
    n, channels, height, width = x.shape
    out = x.new_zeros(n, channels, 2 * height, 2 * width)
    out[:, :, ::2, ::2] = x
    return out


def twice(x: Tensor) -> Tensor:
    return 4 * filtered(spread_out(x), 2, 1)


def phi(x: Tensor) -> Tensor:
    return math.sqrt(2) * torch.where(x > 0, x, 0.2 * x)


def normalised(x: Tensor) -> Tensor:
    return x / (x.pow(2).mean(1, keepdim=True) + 1e-8).sqrt()


def linear(x: Tensor, weights: dict[str, Tensor], name: str, m: float = 1.0) -> Tensor:
    kernel = weights[f"{name}.weight"]
    return x @ (m * kernel / math.sqrt(kernel.shape[1])).T + m * weights[f"{name}.bias"]


def modulated(
    x: Tensor, w: Tensor, weights: dict[str, Tensor], name: str, demodulate: bool, up: bool
) -> Tensor:
    """One image after another, each with a kernel of its own."""
    kernel = weights[f"{name}.weight"]
    styles = linear(w, weights, f"{name}.style")
    out = []
    for image, style in zip(x, styles, strict=True):
        own = kernel / math.sqrt(kernel[0].numel()) * style[None, :, None, None]
        if demodulate:
            own = own / (own.pow(2).sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        if up:
            # A transposed convolution, then the filter, as the authors': each pixel spreads the kernel.
            spread = F.pad(spread_out(image[None])[:, :, :-1, :-1], (2, 2, 2, 2))
            out.append(4 * filtered(F.conv2d(spread, own.flip(2, 3)), 1, 1))
        else:
            out.append(F.conv2d(image[None], own, padding=kernel.shape[-1] // 2))
    return torch.cat(out)


def mapped(weights: dict[str, Tensor], z: Tensor, c: Tensor | None, layers: int = 3) -> Tensor:
    x = normalised(z)
    if c is not None:
        x = torch.cat([x, normalised(weights["blocks.0.embed.weight"][c])], 1)
    for number in range(layers):
        x = phi(linear(x, weights, f"blocks.0.layers.{number}", m=0.01))
    return x


def generated(weights: dict[str, Tensor], w: Tensor, noise) -> Tensor:
    """w [N, layers, z_dim] → images. noise: (layer, size) → [N, 1, size, size]."""
    x, image, layer, block = weights["blocks.1.start"].expand(len(w), -1, -1, -1), None, 0, 1
    while f"blocks.{block}.bias" in weights:
        for conv in range(2 if block > 1 else 1):
            name = f"blocks.{block}.convs.{conv}"
            x = modulated(x, w[:, layer], weights, f"{name}.conv", True, up=block > 1 and conv == 0)
            x = x + weights[f"{name}.noise"] * noise(layer, x.shape[-1])
            x = phi(x + weights[f"{name}.bias"][:, None, None])
            layer += 1
        rgb = modulated(x, w[:, layer], weights, f"blocks.{block}.to_image", False, up=False)
        rgb = rgb + weights[f"blocks.{block}.bias"][:, None, None]
        image = rgb if image is None else twice(image) + rgb
        block += 1
    assert layer + 1 == w.shape[1]
    return image


def conv(x: Tensor, weights: dict[str, Tensor], name: str, down: bool = False) -> Tensor:
    kernel = weights[f"{name}.weight"]
    kernel = kernel / math.sqrt(kernel[0].numel())
    bias = weights.get(f"{name}.bias")
    if down:
        size = kernel.shape[-1] // 2
        return F.conv2d(filtered(x, 1 + size, 1 + size), kernel, bias, stride=2)
    return F.conv2d(x, kernel, bias, padding=kernel.shape[-1] // 2)


def judged(weights: dict[str, Tensor], x: Tensor, c: Tensor | None) -> Tensor:
    x, block = phi(conv(x, weights, "blocks.0.from_image")), 0
    while f"blocks.{block}.match.weight" in weights:
        name = f"blocks.{block}"
        branch = phi(conv(phi(conv(x, weights, f"{name}.conv1")), weights, f"{name}.conv2", down=True))
        x = (branch + conv(x, weights, f"{name}.match", down=True)) / math.sqrt(2)
        block += 1
    x = phi(conv(x, weights, f"blocks.{block}.conv")).flatten(1)
    logits = linear(phi(linear(x, weights, f"blocks.{block}.linear")), weights, "to_logit")
    return logits[:, 0] if c is None else logits[torch.arange(len(c)), c]


@pytest.mark.parametrize("size", [28, 32])
@pytest.mark.parametrize("num_classes", [0, 3])
def test_the_same_formulas_written_again(size, num_classes):
    G, D = pair(size, num_classes=num_classes)
    weights, of_D = dict(G.state_dict()), dict(D.state_dict())
    c = LABELS if num_classes else None
    z = torch.randn(4, 6).double()
    w = mapped(weights, z, c)
    torch.testing.assert_close(G.mapping(z, c), w, rtol=0, atol=1e-10)
    same = w[:, None].expand(-1, G.layers, -1)
    noise = lambda layer, size: white_noise(keys_of(z), layer, size).double()  # noqa: E731
    images = generated(weights, same, noise)
    assert images.std() > 0.1
    torch.testing.assert_close(G(z, c), images, rtol=0, atol=1e-10)
    G.eval()
    still = lambda layer, size: white_noise(torch.zeros(1, dtype=torch.int64), layer, size).double()  # noqa: E731
    torch.testing.assert_close(G(z, c), generated(weights, same, still), rtol=0, atol=1e-10)
    torch.testing.assert_close(D(images, c), judged(of_D, images, c), rtol=0, atol=1e-10)


def test_mixed_latents_are_those_of_two_z():
    G, _ = pair()
    draws = Draws(3, 6, None)
    z = draws.latents("D", 0, Samples.all(4)).z
    columns = draws.mixed(z, 0.5, "D", 0, Samples.all(4))
    assert torch.equal(columns[:, :6], z)
    columns[:, 12] = torch.tensor([0.0, 0.5, 0.999, 1.0])
    mixed, weights = columns.double(), dict(G.state_dict())
    first, second = mapped(weights, mixed[:, :6], LABELS), mapped(weights, mixed[:, 6:12], LABELS)
    assert G.layers == 6
    w = torch.stack([first] * 6, dim=1)
    for image, crossover in enumerate([1, 3, 5, 6]):
        w[image, crossover:] = second[image]
    images = G(mixed, LABELS)
    torch.testing.assert_close(G.latent, w, rtol=0, atol=1e-10)
    noise = lambda layer, size: white_noise(keys_of(mixed), layer, size).double()  # noqa: E731
    torch.testing.assert_close(images, generated(weights, w, noise), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("size", "width", "expected"),
    [(256, 64, (24_767_458, 24_001_089)), (1024, 32, (30_370_060, 29_012_513))],
)
def test_published_parameter_counts(size, width, expected):
    """24.77 and 24.00 M at 256 px (16384 channels · px), 30.37 and 29.01 M at 1024 px (32768). The published
    D sees the standard deviation of its batch beside 512 channels, here left out: 512 kernels of 3×3."""
    with torch.device("meta"):
        G = Generator(z_dim=512, size=size, channels=3, width=width)
        D = Discriminator(size=size, channels=3, width=width)
    assert (count(G), count(D) + 512 * 9) == expected
    assert f"{count(D) / 1e6:.2f}" == f"{expected[1] / 1e6:.2f}" == {256: "24.00", 1024: "29.01"}[size]


@pytest.mark.parametrize("size", SIZES[:-2])
def test_shapes_and_gradients(size):
    torch.manual_seed(0)
    G = Generator(z_dim=5, size=size, channels=1, num_classes=2, width=2, max_width=4, mapping=2)
    D = Discriminator(size=size, channels=1, num_classes=2, width=2, max_width=4)
    c = torch.tensor([0, 1])
    images = G(torch.randn(2, 5), c)
    assert images.shape == (2, 1, size, size) and images.dtype == torch.float32
    logits = D(images, c)
    assert logits.shape == (2,)
    logits.square().sum().backward()
    for name, p in [*G.named_parameters(), *D.named_parameters()]:
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, name


@pytest.mark.parametrize("player", [Generator, Discriminator])
def test_a_size_that_does_not_exist_names_those_that_do(player):
    with pytest.raises(UserError, match="28, 32, 64, 128, 256, 512, 1024"):
        player(size=48, channels=3, **({"z_dim": 4} if player is Generator else {}))


def test_features_neither_vanish_nor_explode_at_first():
    """A mean square near 1 in all layers: of D, on images as smooth as pictures are."""
    torch.manual_seed(0)
    G = Generator(z_dim=64, size=64, channels=3, width=32, max_width=64)
    D = Discriminator(size=64, channels=3, width=32, max_width=64)
    found: dict[str, float] = {}
    for network in (G, D):
        for name, layer in network.named_modules():
            if isinstance(layer, stylegan2._Activation):
                where = f"{type(network).__name__}.{name}"
                layer.register_forward_hook(
                    lambda _, inputs, out, where=where: found.__setitem__(where, out.square().mean().item())
                )
    with torch.no_grad():
        images = G(torch.randn(32, 64))
        D(F.interpolate(torch.randn(32, 3, 8, 8), scale_factor=8, mode="bicubic"))
    assert len(found) == 1 + 9 + 4 + 1
    assert all(0.1 < square < 2 for square in found.values()), found
    assert 0.3 < images.std(0).mean() < 4


def test_samples_are_a_function_of_z_alone():
    G, _ = pair()
    z = torch.randn(4, 6).double()
    noisy = G(z, LABELS)
    G.eval()
    torch.testing.assert_close(G(z, LABELS)[1:3], G(z[1:3], LABELS[1:3]))
    assert not torch.allclose(noisy, G(z, LABELS))
    torch.testing.assert_close(G(z, LABELS), G.synthesis(G.mapping(z, LABELS)))
    assert "latent" not in vars(pair()[0].eval())


def test_path_length_reaches_the_mapping():
    """The latent that G offers is the one its images are computed from, and the mapping trains by it."""
    G, _ = pair(activation="silu")
    z = Draws(0, 6, None).mixed(torch.randn(4, 6), 1.0, "G", 0, Samples.all(4)).double()
    lengths = path_lengths(G(z, LABELS), G.latent)
    assert G.latent.shape == (4, G.layers, 6) and lengths.shape == (4,)
    lengths.square().sum().backward()
    first = G.blocks[0].layers[0].weight.grad
    assert first is not None and first.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_kept_throughout_and_close(dtype):
    """A tensor of float32 among the features would promote all that follow."""
    torch.manual_seed(0)
    G = Generator(z_dim=16, size=32, channels=3, width=16, max_width=32)
    D = Discriminator(size=32, channels=3, width=16, max_width=32)
    nn.init.ones_(G.blocks[1].convs[0].noise)
    z = torch.randn(8, 16)
    exact = G(z)
    with torch.autocast("cpu", dtype=dtype):
        images = G(z)
        logits = D(images)
    assert images.dtype == logits.dtype == dtype
    assert (images.float() - exact).square().mean() < 1e-3 * exact.square().mean()
    assert (logits.float() - D(exact)).abs().max() < 0.05 * D(exact).abs().max() + 0.02


def test_checkpointing_changes_no_bit():
    """Noise is the same in the second pass, and path length reaches through it."""
    z, found = torch.randn(4, 6).double(), []
    for checkpoint in (False, True):
        G, D = pair(activation="silu", checkpoint=checkpoint)
        images = G(z, LABELS)
        torch.manual_seed(1)
        (path_lengths(images, G.latent).square().sum() + D(images, LABELS).sum()).backward()
        found.append([p.grad for p in (*G.parameters(), *D.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_blocks_can_be_sharded_one_by_one():
    """All but the last layer of D is in the entries of one sequence; the mapping is one of them."""
    with torch.device("meta"):
        G = Generator(z_dim=512, size=256, channels=3)
        D = Discriminator(size=256, channels=3)
    assert sum(map(count, G.blocks)) == count(G) and count(G.blocks[0]) == 8 * (512 * 512 + 512)
    assert count(D) - sum(map(count, D.blocks)) == 513
    assert max(map(count, G.blocks)) < 0.25 * count(G) and max(map(count, D.blocks)) < 0.3 * count(D)


@pytest.mark.parametrize("size", SIZES[-2:])
def test_large_sizes_give_images_of_that_size(size):
    with torch.device("meta"):
        G = Generator(z_dim=5, size=size, channels=3, width=2, max_width=4)
        D = Discriminator(size=size, channels=3, width=2, max_width=4)
        images = G(torch.zeros(2, 5))
        assert images.shape == (2, 3, size, size) and D(images).shape == (2,)
