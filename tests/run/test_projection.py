"""Latents of images: found again where G made them, in z and in w, whatever G is."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pipeline.config import UserError
from pipeline.gan import dcgan, stylegan2
from pipeline.gan.images import to_uint8
from pipeline.run import projection
from pipeline.run.projection import Projection, Projector

CPU = torch.device("cpu")


class Mixer(nn.Module):
    """A user's own: two latents brighten each a half of the image, around a grey level of the class."""

    def forward(self, z: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        level = 0.0 if c is None else torch.tensor([-0.8, 0.0, 0.8])[c].view(-1, 1, 1, 1)
        halves = torch.tanh(z).view(-1, 1, 2, 1).repeat_interleave(4, 2).expand(-1, 1, 8, 8)
        return level + 0.2 * halves


class Linear(nn.Linear):
    def __init__(self) -> None:
        super().__init__(50, 64, bias=False)

    def forward(self, z, c=None):
        return super().forward(z).view(-1, 1, 8, 8)


class Detached(Mixer):
    def forward(self, z, c=None):
        return super().forward(z, c).detach()


class Broken(Mixer):
    def forward(self, z, c=None):
        return super().forward(z, c) * math.nan


class Noisy(Mixer):
    def forward(self, z, c=None):
        return super().forward(z, c) + 0.01 * torch.randn(len(z), 1, 8, 8)


def ready(G: nn.Module) -> nn.Module:
    return G.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def G():
    torch.manual_seed(0)
    return ready(dcgan.Generator(z_dim=8, size=28, channels=1, width=4, norm="none"))


def only(G: nn.Module, z_dim: int, images: torch.Tensor, **how) -> Projection:
    (found,) = Projector(G, z_dim, CPU, **how).project(images)
    return found


def made(G: nn.Module, seed: int, z_dim: int, count: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    z = torch.randn(count, z_dim, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return z, to_uint8(G(z))


def test_an_image_of_g_is_found_again(G):
    z, images = made(G, 1, 8)
    found = only(G, 8, images, steps=200)
    assert found.kind == "z" and found.latent.shape == (8,) and found.label is None
    assert found.last < found.first / 100 and found.last < 1e-5
    assert torch.allclose(found.latent, z[0], atol=0.05)
    assert found.way.shape == (5, 1, 28, 28) and found.way.dtype == torch.uint8
    with torch.no_grad():
        assert torch.equal(found.way[-1], to_uint8(G(found.latent[None]))[0])
    errors = [((one.double() - images[0]) / 255).square().mean().item() for one in found.way]
    assert errors[0] == pytest.approx(found.first) and errors[-1] == pytest.approx(found.last)


def test_a_z_stays_as_long_as_normal_ones():
    """Longer ones would come closer to white, shorter ones to grey."""
    white, grey = (torch.full((1, 1, 8, 8), level, dtype=torch.uint8) for level in (255, 128))
    longest = only(ready(Mixer()), 2, white, steps=60).latent.norm().item()
    assert longest == pytest.approx(math.sqrt(2) + math.sqrt(2), rel=1e-5)
    torch.manual_seed(0)
    shortest = only(ready(Linear()), 50, grey, steps=60).latent.norm().item()
    assert shortest == pytest.approx(math.sqrt(50) - math.sqrt(2), rel=1e-5)


def test_a_search_never_ends_farther_away_than_it_began(G):
    """An image of one of the starts, which even the first step leaves."""
    start = Projector(G, 8, CPU)._space.starts[5]
    found = only(G, 8, to_uint8(G(start[None])), steps=2)
    assert found.last == 0 and torch.equal(found.latent, start)


def test_images_do_not_influence_each_other_and_the_seed_decides(G):
    _, images = made(G, 2, 8, count=2)
    both = list(Projector(G, 8, CPU, steps=8).project(images))
    alone = only(G, 8, images[1:], steps=8)
    assert torch.equal(both[1].latent, alone.latent) and both[1].last == alone.last
    assert not torch.equal(alone.latent, only(G, 8, images[1:], steps=8, seed=1).latent)


def test_steps_are_counted(G):
    _, images = made(G, 2, 8, count=2)
    steps = []
    assert len(list(Projector(G, 8, CPU, steps=5).project(images, lambda: steps.append(1)))) == 2
    assert len(steps) == 10


@pytest.mark.parametrize(("classes", "seed"), [(0, 1), (3, 2)])
def test_stylegan2_is_searched_in_w(classes, seed):
    """An untrained G of eight dimensions has local minima, and there is one start for each class."""
    torch.manual_seed(0)
    G = stylegan2.Generator(z_dim=8, size=28, channels=3, num_classes=classes, width=4, max_width=8)
    ready(G)
    labels = torch.tensor([2]) if classes else None
    with torch.no_grad():
        w = G.mapping(torch.randn(1, 8, generator=torch.Generator().manual_seed(seed)), labels)
        images = to_uint8(G.synthesis(w))
    found = only(G, 8, images, num_classes=classes, steps=100)
    assert found.kind == "w" and (found.label is None) == (classes == 0)
    assert found.last < found.first / 8
    with torch.no_grad():
        assert torch.equal(found.way[-1], to_uint8(G.synthesis(found.latent[None]))[0])
        z = torch.randn(4000, 8, generator=torch.Generator().manual_seed(2))
        c = torch.full((4000,), found.label) if classes else None
        start = to_uint8(G.synthesis(G.mapping(z, c).mean(0, keepdim=True)))[0]
    assert (found.way[0].int() - start.int()).abs().max() <= 12  # another estimate of the mean w


def test_a_network_of_ones_own_and_its_class_are_found():
    G = ready(Mixer())
    z, c = torch.tensor([[0.7, -1.1]]), torch.tensor([2])
    images = to_uint8(G(z, c))
    found = only(G, 2, images, num_classes=3, steps=100)
    assert found.label == 2 and torch.allclose(found.latent, z[0], atol=0.1)
    other = only(G, 2, images, num_classes=3, label=1, steps=100)
    assert other.label == 1 and other.last > 100 * found.last


def test_a_g_that_draws_numbers_gives_the_same_each_time():
    images, state = to_uint8(Mixer()(torch.tensor([[0.7, -1.1]]))), torch.get_rng_state()
    first, second = (only(Noisy(), 2, images, steps=5) for _ in range(2))
    assert torch.equal(first.way, second.way) and torch.equal(first.latent, second.latent)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("kind", "message"), [(Detached, "no gradient"), (Broken, "not finite")])
def test_a_g_that_cannot_be_searched_is_refused(kind, message):
    images = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    with pytest.raises(UserError, match=message):
        only(ready(kind()), 2, images)


def test_features_count_from_64_pixels_on():
    """Two grey noises of equal statistics: of equal error, but closer in features than noise and a step."""
    distance = projection._Distance(CPU)
    random = torch.Generator().manual_seed(0)
    noise, like = torch.randn(2, 1, 1, 64, 64, generator=random).clamp(-1, 1)
    step = torch.linspace(-1, 1, 64).sign().expand(1, 1, 64, 64)

    def between(a, b):
        return (distance.embed(a) - distance.embed(b)).square().sum().item()

    pixels = (noise - like).square().mean().item()
    assert between(noise, like) > pixels and between(noise, noise) == 0
    small = between(noise[..., :32, :32], like[..., :32, :32])
    assert small == pytest.approx((noise - like)[..., :32, :32].square().mean().item(), rel=1e-5)
    rest = {
        name: between(noise, b) - (noise - b).square().mean().item() for name, b in (("a", like), ("b", step))
    }
    assert rest["a"] < rest["b"]
    image = noise.clone().requires_grad_()
    between_grad = (distance.embed(image) - distance.embed(like)).square().sum()
    (slope,) = torch.autograd.grad(between_grad, image)
    assert slope.isfinite().all() and not torch.allclose(slope, 2 * (noise - like) / noise.numel())
