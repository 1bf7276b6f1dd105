"""R3GAN: the published sizes, a second implementation, the start, labels."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pipeline.config import UserError, load
from pipeline.gan.networks import _Unfilled, build_D, build_G, check_networks
from pipeline.gan.penalised import penalised
from pipeline.gan.r3gan import SIZES, Basis, Block, Discriminator, Generator, initialise_blocks


def count(module):
    return sum(p.numel() for p in module.parameters())


def pair(size=32, channels=1, num_classes=0, width=8, seed=0, **options):
    torch.manual_seed(seed)
    shared = {"size": size, "channels": channels, "num_classes": num_classes, "width": width} | options
    return Generator(z_dim=6, **shared), Discriminator(**shared)


def trained(network):
    """Every parameter random, at a scale at which all of them matter."""
    with torch.no_grad():
        for p in network.parameters():
            p.normal_(0, 1 / math.sqrt(p[0].numel()) if p.ndim > 1 else 0.3)
    return network


@pytest.mark.parametrize(
    ("size", "widths", "classes", "published"),
    [
        (256, (96, 768), 0, (23.06, 23.01)),
        (64, (384, 768), 0, (22.43, 22.38)),
        (32, (768, 768), 10, (20.78, 21.28)),
        (32, (768, 768), 0, (20.73, 20.68)),
        (64, (1536, 1536), 1000, (103.6, 107.2)),
    ],
)
def test_as_many_parameters_as_published(size, widths, classes, published):
    shared = {"size": size, "channels": 3, "num_classes": classes, "depth": 2}
    shared |= {"width": widths[0], "max_width": widths[1]}
    with torch.device("meta"), _Unfilled():
        networks = Generator(z_dim=64, **shared), Discriminator(**shared)
    digits = 1 if published[0] > 100 else 2
    assert tuple(round(count(network) / 1e6, digits) for network in networks) == published


@pytest.mark.parametrize("size", SIZES)
def test_every_size_has_networks_that_fit(size):
    """The largest with as little arithmetic as they can have."""
    G, D = pair(size, channels=3 if size < 64 else 1, width=1, max_width=2)
    images = G(torch.randn(1, 6))
    assert images.shape == (1, 3 if size < 64 else 1, size, size)
    assert D(images).shape == (1,)


@pytest.mark.parametrize("size", [0, 4, 48, 2048])
@pytest.mark.parametrize("network", [Generator, Discriminator])
def test_a_size_that_does_not_exist_names_those_that_do(network, size):
    z_dim = {"z_dim": 4} if network is Generator else {}
    with pytest.raises(UserError, match="28, 32, 64, 128, 256, 512, 1024"):
        network(size=size, channels=3, **z_dim)


# A second implementation, from the formulas: y = x + C₃ φ(C₂ φ(C₁ x)), φ(u) = act(u + b).


def block(x, p, act):
    b1, b2 = p["expand.bias"][:, None, None], p["mix.bias"][:, None, None]
    u = act(torch.einsum("oi,nihw->nohw", p["expand.weight"][:, :, 0, 0], x) + b1)
    weight = p["mix.weight"]
    size = weight.shape[1]  # channels of a group
    parts = [
        F.conv2d(u[:, i : i + size], weight[i : i + size], padding=1) for i in range(0, u.shape[1], size)
    ]
    u = act(torch.cat(parts, 1) + b2)
    return x + torch.einsum("oi,nihw->nohw", p["reduce.weight"][:, :, 0, 0], u)


def axis(n):
    """The matrix [n, 2n] that shrinks an axis."""
    matrix = torch.zeros(n, 2 * n + 2, dtype=torch.float64)
    for i in range(n):
        matrix[i, 2 * i : 2 * i + 4] = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    return matrix[:, 1:-1]


def resampled(x, p, up):
    n = x.shape[-1] if up else x.shape[-1] // 2
    a = 2 * axis(n).T if up else axis(n)
    x = a @ x @ a.T
    if "match.weight" in p:
        x = torch.einsum("oi,nihw->nohw", p["match.weight"][:, :, 0, 0], x)
    return x


def parts(network, prefix):
    return {n.removeprefix(prefix): p for n, p in network.named_parameters() if n.startswith(prefix)}


def stages(x, network, up, act):
    """All blocks, by the names of their parameters and the widths of features."""
    names = [name for name, m in network.named_modules() if isinstance(m, Block)]
    for i, name in enumerate(names):
        if i and i % network_depth(network) == 0:
            x = resampled(x, parts(network, name.rpartition(".")[0] + ".0."), up)
        x = block(x, parts(network, name + "."), act)
    return x


def network_depth(network):
    blocks = sum(isinstance(m, Block) for m in network.modules())
    return blocks // (1 + int(math.log2(network.image_size // network.basis.weight.shape[-1])))


@pytest.mark.parametrize(
    ("size", "channels", "num_classes", "options"),
    [
        (28, 1, 0, {"depth": 1, "width": 24}),
        (32, 3, 3, {"depth": 2, "width": 20, "max_width": 40}),
        (64, 3, 2, {"depth": 1, "width": 16, "max_width": 16, "activation": "silu"}),
    ],
)
def test_a_second_implementation_agrees(size, channels, num_classes, options):
    G, D = (trained(network.double()) for network in pair(size, channels, num_classes, **options))
    G.image_size = D.image_size = size
    act = F.silu if options.get("activation") == "silu" else lambda u: torch.where(u > 0, u, 0.2 * u)
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(3, 6, dtype=torch.float64, generator=generator)
    x = torch.randn(3, channels, size, size, dtype=torch.float64, generator=generator)
    c = torch.tensor([0, 1, 1]) if num_classes else None

    given = torch.cat([z, G.embed.weight[c]], 1) if num_classes else z
    h = torch.einsum("nc,chw->nchw", given @ G.project.weight.T, G.basis.weight)
    h = stages(h, G, True, act)
    expected = torch.einsum("oi,nihw->nohw", G.blocks[-1][-1].weight[:, :, 0, 0], h)
    torch.testing.assert_close(G(z, c), expected, rtol=1e-10, atol=1e-10)

    h = stages(torch.einsum("oi,nihw->nohw", D.blocks[0][0].weight[:, :, 0, 0], x), D, False, act)
    features = torch.einsum("nchw,chw->nc", h, D.basis.weight) @ D.project.weight.T
    expected = (features * D.embed.weight[c]).sum(1) if num_classes else features[:, 0]
    torch.testing.assert_close(D(x, c), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("channels", "groups"), [(4, 1), (20, 2), (96, 12), (768, 96), (1536, 96)])
def test_groups_have_sixteen_channels_and_there_are_at_most_96(channels, groups):
    with torch.device("meta"), _Unfilled():
        assert Block(channels, "silu").mix.groups == groups


def test_a_new_block_is_the_identity_bit_for_bit():
    G, D = pair(28, depth=2)
    x = torch.randn(2, 8, 28, 28)
    for blocks in ([m for m in network.modules() if isinstance(m, Block)] for network in (G, D)):
        assert len(blocks) == 6
        for new in (b for b in blocks if b.reduce.out_channels == 8):
            assert torch.equal(new(x), x)


def test_a_new_branch_has_the_scale_that_suits_its_number():
    """Each of two kernels of L branches starts at L^(−1/4) of He's, so the branch at 1/√L of x's scale."""
    blocks = nn.Sequential(*(Block(256, "leaky_relu") for _ in range(9)))
    torch.manual_seed(0)
    initialise_blocks(blocks)
    x = torch.randn(4, 256, 12, 12)
    first = blocks[0]
    with torch.no_grad():
        branch = first.activation(first.mix(first.activation(first.expand(x))))[..., 1:-1, 1:-1]
    # A leaky ReLU after He's gain has mean square 1: twice (9^(−1/4))² = 1/9.
    assert branch.square().mean().item() == pytest.approx(1 / 9, rel=0.1)


def without_blocks(network):
    """A new network computes the same without its blocks."""
    for name in [name for name, m in network.named_modules() if isinstance(m, Block)]:
        network.set_submodule(name, nn.Identity())
    return network


def test_a_new_g_s_images_have_the_variance_of_the_resampled_basis():
    """Blocks are the identity and other layers keep variances, so only resampling lowers them."""
    torch.manual_seed(0)
    G = Generator(z_dim=64, size=32, channels=3, num_classes=5, width=256, max_width=256)
    z, c = torch.randn(200, 64), torch.arange(200) % 5
    with torch.no_grad():
        assert torch.equal(G(z[:2], c[:2]), without_blocks(copy.deepcopy(G))(z[:2], c[:2]))
        images = without_blocks(G)(z, c).double()
    a = 8 * (axis(4) @ axis(8) @ axis(16)).T
    due = (a.square().sum(1)[:, None] * a.square().sum(1)) * (1 + 1 / 5) / 2  # z 1, embedded labels 1/5
    assert images.var(0).mean().item() == pytest.approx(due.mean().item(), rel=0.15)


def test_a_new_d_s_logits_have_the_variance_of_the_resampled_image():
    torch.manual_seed(0)
    D = without_blocks(Discriminator(size=32, channels=3, num_classes=5, width=128, max_width=128))
    x, c = torch.randn(150, 3, 32, 32), torch.arange(150) % 5
    with torch.no_grad():
        logits = D(x, c).double()
    a = axis(4) @ axis(8) @ axis(16)
    due = (a.square().sum(1)[:, None] * a.square().sum(1)).mean() / 5
    assert logits.square().mean().item() == pytest.approx(due.item(), rel=0.25)


def test_images_are_not_bounded():
    G, _ = pair()
    with torch.no_grad():
        G.blocks[-1][-1].weight.mul_(100)
    assert G(torch.randn(4, 6)).abs().max() > 2


def test_a_class_has_no_logit_without_its_embedding():
    _, D = pair(num_classes=3)
    x = torch.randn(3, 1, 32, 32)
    with torch.no_grad():
        D.embed.weight[1] = 0
    logits = D(x, torch.tensor([0, 1, 2]))
    assert logits[1] == 0 and (logits[[0, 2]] != 0).all()


def test_labels_matter_to_g():
    G, _ = pair(num_classes=2)
    z = torch.randn(1, 6)
    assert not torch.allclose(G(z, torch.tensor([0])), G(z, torch.tensor([1])))


def test_every_parameter_of_a_trained_pair_learns_from_r1():
    for network in pair(28, num_classes=3, width=8):
        trained(network)
    G, D = pair(28, num_classes=3, activation="silu")
    trained(G), trained(D)
    c = torch.tensor([0, 1, 2])
    x = G(torch.randn(3, 6), c)
    (slope,) = torch.autograd.grad(D(x, c).sum(), x, create_graph=True)
    slope.square().sum().backward()
    for name, p in [*G.named_parameters(), *D.named_parameters()]:
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, name


def test_in_bf16_features_stay_in_bf16_and_channels_last():
    G, D = pair(num_classes=2)
    c, seen = torch.tensor([0, 1]), []
    for network in (G, D):
        for layer in network.blocks:
            layer.register_forward_hook(lambda _m, _i, out: seen.append(out))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        D(G(torch.randn(2, 6), c), c).sum().backward()
    assert len(seen) == 8 and all(out.dtype == torch.bfloat16 for out in seen)
    assert all(out.is_contiguous(memory_format=torch.channels_last) for out in seen)


@pytest.mark.parametrize("player", [0, 1])
def test_checkpointing_changes_no_gradient(player):
    c, given = torch.tensor([0, 1]), (torch.randn(2, 6), torch.randn(2, 1, 28, 28))[player]
    gradients = []
    for checkpoint in (False, True):
        network = trained(pair(28, num_classes=2, checkpoint=checkpoint)[player])
        with torch.no_grad():
            for i, p in enumerate(network.parameters()):
                p.copy_(torch.sin(torch.arange(p.numel()) + i).view(p.shape) / math.sqrt(p[0].numel()))
        x = given.clone().requires_grad_()
        out = network(x, c)
        (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        (out.square().mean() + slope.square().sum()).backward()
        gradients.append([p.grad for p in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_blocks_can_be_sharded_one_by_one():
    for network in pair(64, width=16, max_width=64, depth=2):
        sizes = [count(entry) for entry in network.blocks]
        assert sum(sizes) > 0.95 * count(network) and max(sizes) < 0.2 * count(network)
        assert not dict(network.named_buffers())


def test_penalised_are_the_kernels_and_nothing_else():
    for network in pair(num_classes=3, depth=2):
        kernels = {
            f"{name}.weight"
            for name, layer in network.named_modules()
            if isinstance(layer, nn.Conv2d | nn.Linear | Basis)
        }
        assert penalised(network, "auto") == dict.fromkeys(kernels, 1.0)


def config(*settings):
    small = ["data.train=x", "G.width=4", "D.width=4", "G.z_dim=8", "G.kind=r3gan", "D.kind=r3gan"]
    return load(None, [*small, *settings])


def test_from_the_config():
    settings = config("G.max_width=8", "G.depth=2", "D.max_width=16", "data.size=28", "data.channels=1")
    check_networks(settings, 0)
    G, D = build_G(settings, 0), build_D(settings, 0)
    assert G.basis.weight.shape == (8, 7, 7) and D.basis.weight.shape == (16, 7, 7)
    assert sum(isinstance(m, Block) for m in G.modules()) == 6
    assert all(
        torch.equal(a, b) for a, b in zip(G.parameters(), build_G(settings, 0).parameters(), strict=True)
    )


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        (["G.norm=none"], r"G\.norm=none: r3gan does not take it"),
        (["D.spectral_norm=true"], r"D\.spectral_norm=True: r3gan does not take it"),
        (["D.blocks=1"], r"D\.blocks=1: r3gan does not take it, only dcgan"),
        (["G.kind=dcgan", "G.max_width=64"], r"G\.max_width=64: dcgan does not take it"),
        (["data.size=48"], r"data\.size=48: r3gan has no network"),
        (["G.kind=dcgan", "G.blocks=1", "G.spectral_norm=true"], "kernel of zeros"),
    ],
)
def test_keys_that_mean_nothing_are_refused(settings, refused):
    with pytest.raises(UserError, match=refused):
        check_networks(config(*settings), 0)
