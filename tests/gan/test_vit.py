"""Transformers: the formulas written a second time, published sizes, second derivatives through attention."""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.config import UserError, load
from pipeline.gan.networks import build_D, build_G, check_networks
from pipeline.gan.vit import Discriminator, Generator
from pipeline.gan.vit_layers import rotations

KEYS = {"size": 12, "channels": 2, "num_classes": 3, "width": 24, "depth": 5, "heads": 3, "patch": 3}
C = torch.tensor([0, 2, 1])


def pair(**keys):
    torch.manual_seed(0)
    G, D = Generator(z_dim=6, outputs=2, **KEYS | keys), Discriminator(**KEYS | keys)
    for network in (G, D):  # away from a start at which biases are 0 and gates small
        for p in network.parameters():
            p.data += 0.3 * p.data.std(correction=0) * torch.randn_like(p) + 0.1 * torch.randn_like(p)
    return G.double(), D.double()


def count(network):
    return sum(p.numel() for p in network.parameters())


# A second implementation: of a state dict, one image and one token at a time where that is shorter.


def normal(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6) ** 0.5


def silu(x):
    return x / (1 + (-x).exp())


def linear(p, name, x):
    return torch.einsum("oi,...i->...o", p[f"{name}.weight"], x) + p[f"{name}.bias"]


def equalised(p, name, x):
    weight, bias = p[f"{name}.weight"], p[f"{name}.bias"]
    return x @ (0.01 / weight.shape[1] ** 0.5 * weight).T + 0.01 * bias


def waves(count):
    return [10_000 ** (-i / count) for i in range(count)]


def place(side, width):
    """[side², width]: for row, then column, all sines, then all cosines."""
    out = torch.empty(side, side, width, dtype=torch.float64)
    for row in range(side):
        for column in range(side):
            values = []
            for at in (row, column):
                angles = [at * f for f in waves(width // 4)]
                values += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            out[row, column] = torch.tensor(values, dtype=torch.float64)
    return out.view(side**2, width)


def rotated(x, tokens_before, side):
    """x [T, d] as d/2 complex numbers, turned by their token's row and column."""
    d = x.shape[1]
    turned = torch.complex(x[:, : d // 2], x[:, d // 2 :])
    rows = []
    for number in range(len(x)):
        row, column = divmod(number - tokens_before, side) if number >= tokens_before else (0, 0)
        angles = torch.tensor([at * f for at in (row, column) for f in waves(d // 4)], dtype=x.dtype)
        rows.append(turned[number] * torch.polar(torch.ones(d // 2, dtype=x.dtype), angles))
    turned = torch.stack(rows)
    return torch.cat([turned.real, turned.imag], 1)


def attention(p, name, x, heads, before, side):
    """x [T, width]."""
    out, qkv = [], linear(p, f"{name}.qkv", x).chunk(3, dim=1)
    for q, k, v in zip(*(t.chunk(heads, dim=1) for t in qkv), strict=True):
        q, k = (rotated(normal(t), before, side) for t in (q, k))
        scores = (q @ k.T / q.shape[1] ** 0.5).exp()
        out.append(scores / scores.sum(1, keepdim=True) @ v)
    return linear(p, f"{name}.out", torch.cat(out, 1))


def mlp(p, name, x):
    a, b = linear(p, f"{name}.ab", x).chunk(2, dim=1)
    return linear(p, f"{name}.out", silu(a) * b)


def generated(p, z, c, size, width, depth, heads, patch, channels):
    side, label = size // patch, p["embed.weight"][c]
    w = equalised(p, "mapping.2", silu(equalised(p, "mapping.0", torch.cat([normal(z), normal(label)]))))
    x, image = place(side, width), torch.zeros(channels, size, size, dtype=z.dtype)
    for number in range(depth):
        name = f"blocks.{number}"
        s1, g1, s2, g2 = linear(p, f"{name}.modulation", silu(w)).chunk(4)
        x = x + g1 * attention(p, f"{name}.attention", normal(x) * (1 + s1), heads, 0, side)
        x = x + g2 * mlp(p, f"{name}.mlp", normal(x) * (1 + s2))
        if number in (1, 4):  # after 2.5 and 5 of 5 blocks
            head = f"images.{0 if number == 1 else 1}"
            pixels = linear(p, f"{head}.pixels", normal(x) * (1 + linear(p, f"{head}.modulation", silu(w))))
            for token, values in enumerate(pixels):
                row, column = (patch * at for at in divmod(token, side))
                square = values.view(channels, patch, patch)
                image[:, row : row + patch, column : column + patch] += square
    return image


def judged(p, image, c, size, width, depth, heads, patch, channels):
    side, patches = size // patch, []
    for row in range(0, size, patch):
        for column in range(0, size, patch):
            patches.append(image[:, row : row + patch, column : column + patch].flatten())
    x = linear(p, "from_pixels", torch.stack(patches)) + place(side, width)
    x = torch.cat([p["token"][None], x])
    for number in range(depth):
        name = f"blocks.{number}"
        x = x + p[f"{name}.scale"] * attention(p, f"{name}.attention", normal(x), heads, 1, side)
        x = x + p[f"{name}.mlp_scale"] * mlp(p, f"{name}.mlp", normal(x))
    token = normal(x[0])
    return linear(p, "to_logit", token)[0] + (token * p["embed.weight"][c]).sum()


def test_it_is_what_a_second_implementation_computes():
    sizes = {key: KEYS[key] for key in ("size", "width", "depth", "heads", "patch", "channels")}
    G, D = pair()
    z = torch.randn(3, 6, dtype=torch.float64)
    images, w = G(z, C), G.latent
    assert w.shape == (3, 24) and images.shape == (3, 2, 12, 12)
    expected = torch.stack(
        [generated(dict(G.named_parameters()), *of, **sizes) for of in zip(z, C, strict=True)]
    )
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-10)
    logits = [judged(dict(D.named_parameters()), *of, **sizes) for of in zip(images, C, strict=True)]
    torch.testing.assert_close(D(images, C), torch.stack(logits), rtol=0, atol=1e-10)
    assert images.std() > 0.1 and D(images, C).std() > 0.1


@pytest.mark.parametrize("player", ["G", "D"])
def test_second_derivatives_by_plain_products_alone(player):
    """Torch's fused attention refuses; a torch that no longer does makes `Engine.updating` simpler."""
    G, D = pair(size=4, patch=2, width=8, heads=2, depth=2, channels=1, num_classes=0)
    x = torch.randn(2, *((6,) if player == "G" else (1, 4, 4)), dtype=torch.float64, requires_grad=True)
    network = G if player == "G" else D
    with sdpa_kernel(SDPBackend.MATH):
        assert torch.autograd.gradgradcheck(network, (x,))
    (slope,) = torch.autograd.grad(network(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"derivative for .*scaled_dot_product.* is not implemented"):
        slope.square().sum().backward()


def test_attention_sees_how_far_tokens_are_apart_and_not_where_they_are():
    """Rotated by their places, queries and keys have products that depend on the difference alone."""
    q, k = torch.randn(2, 8)
    cos, sin = rotations(5, 8, q)

    def turned(x):
        return torch.cat([x[:4] * cos - x[4:] * sin, x[:4] * sin + x[4:] * cos], dim=1)

    products = (turned(q) @ turned(k).T).view(5, 5, 5, 5)
    torch.testing.assert_close(products[:4, :4, :4, :4], products[1:, 1:, 1:, 1:], rtol=0, atol=1e-5)
    assert (products[0, 0, 0] - products[0, 0, 0, 0])[1:].abs().min() > 1e-3


def test_published_sizes():
    """GAT-XL/2 has 602 M parameters."""
    keys = {"size": 32, "channels": 4, "num_classes": 1000}
    with torch.device("meta"):
        G = Generator(z_dim=64, width=1152, depth=28, heads=16, **keys)
        D = Discriminator(width=1152, depth=28, heads=16, **keys)
        by_default = Discriminator(width=1152, depth=1, **keys)
    assert round(count(G) / 1e6) == 602 and round(count(D) / 1e6) == 447
    assert by_default.blocks[0].attention.heads == 18
    for network in (G, D):
        sizes = [count(block) for block in network.blocks]
        assert sum(sizes) > 0.98 * count(network) and max(sizes) == min(sizes)


@pytest.mark.parametrize(
    ("depth", "outputs", "depths"), [(4, 4, [1, 2, 3, 4]), (28, 4, [7, 14, 21, 28]), (5, 2, [2, 5])]
)
def test_outputs_are_spread_over_the_depth_and_end_with_it(depth, outputs, depths):
    G = Generator(z_dim=4, size=4, channels=1, width=8, depth=depth, outputs=outputs)
    assert G.depths == depths
    G(torch.randn(2, 4)).square().sum().backward()
    for name, p in G.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


@pytest.mark.parametrize("num_classes", [0, 3])
def test_every_parameter_of_d_learns(num_classes):
    D = Discriminator(**KEYS | {"num_classes": num_classes})
    D(torch.randn(3, 2, 12, 12), C if num_classes else None).square().sum().backward()
    for name, p in D.named_parameters():
        assert p.grad.abs().sum() > 0, name


def test_a_start_that_is_neither_small_nor_large():
    torch.manual_seed(0)
    keys = {"size": 16, "channels": 3, "width": 64, "depth": 4}
    G, D = Generator(z_dim=32, **keys), Discriminator(**keys)
    images = G(torch.randn(64, 32))
    assert 0.5 < images.std() < 4 and images.std(0).mean() > 0.01
    logits = D(torch.randn(64, 3, 16, 16))
    assert 0.1 < (logits - logits.mean()).std() < 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["G.depth=3"], r"G\.depth=3: vit has fewer blocks than G\.outputs=4"),
        (["D.patch=5"], r"patch=5 does not divide data\.size=28. Set it to 1, 2, 4 for vit"),
        (["D.heads=3"], r"width=64: vit cannot divide it into heads=3"),
        (["G.heads=32"], r"a multiple of 128"),
        (["D.norm=none"], r"D\.norm=none: vit does not take it, only .*dcgan"),
    ],
)
def test_what_does_not_fit_is_refused(settings, message):
    given = ["data.train=x", "data.size=28", "G.kind=vit", "D.kind=vit", "G.depth=4"]
    check_networks(load(None, given), 0)
    with pytest.raises(UserError, match=message):
        check_networks(load(None, [*given, *settings]), 0)


def test_it_is_built_from_a_config():
    keys = [f"{player}.{key}" for player in "GD" for key in ("kind=vit", "width=16", "depth=4", "patch=8")]
    config = load(None, ["data.train=x", "data.size=32", "data.channels=1", "G.z_dim=5", *keys])
    G, D = build_G(config, 3), build_D(config, 3)
    assert D(G(torch.randn(3, 5), C), C).shape == (3,)
    assert {name: p.shape for name, p in G.state_dict().items()} == {
        n: p.shape for n, p in G.named_parameters()
    }
