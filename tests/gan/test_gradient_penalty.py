"""R1, R2 and WGAN-GP against gradients worked out by hand, and their finite differences against the limit."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from pipeline.gan import gradient_penalty
from pipeline.gan.dcgan import Discriminator
from pipeline.gan.gradient_penalty import Interpolated, Judged, Slope, judge

GAMMA = 4.0
GRID = tuple(itertools.product(("real", "fake"), (1, 2)))


def judged(D: Callable[[Tensor], Tensor], images: Tensor, differentiate: bool = True) -> Judged:
    return judge(lambda x, _: D(x), lambda x, _: x, images.detach(), None, None, differentiate)


def both(D: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor) -> tuple[Judged, Judged]:
    return judged(D, real), judged(D, fake)


@pytest.mark.parametrize(("on", "every"), GRID)
def test_a_linear_discriminator_has_the_gradient_of_its_kernel(on, every):
    torch.manual_seed(0)
    D = nn.Linear(3 * 5 * 5, 1)
    seen = both(lambda x: D(x.flatten(1)).flatten(), torch.randn(6, 3, 5, 5), torch.randn(6, 3, 5, 5))
    penalty = Slope("r", on, GAMMA, every=every)(*seen)
    torch.testing.assert_close(penalty, GAMMA / 2 * D.weight.square().sum())
    (slope,) = torch.autograd.grad(penalty, D.weight)
    torch.testing.assert_close(slope, GAMMA * D.weight)


@pytest.mark.parametrize(("on", "every"), GRID)
def test_a_quadratic_discriminator(on, every):
    """D(x) = ½ xᵀAx has ∇D = Ax: (γ/2) E‖Ax‖², over the images taken alone."""
    torch.manual_seed(0)
    half = torch.randn(16, 16, dtype=torch.float64)
    A = (half + half.T).requires_grad_()
    images = {"real": torch.randn(8, 1, 4, 4).double(), "fake": torch.randn(8, 1, 4, 4).double() + 1}
    seen = both(lambda x: 0.5 * (x.flatten(1) @ A * x.flatten(1)).sum(1), images["real"], images["fake"])
    penalty = Slope("r", on, GAMMA, every=every)(*seen)
    chosen = images[on].flatten(1)[::every]
    expected = GAMMA / 2 * (chosen @ A).square().sum(1).mean()
    assert penalty.dtype == torch.float64 and penalty.shape == ()
    torch.testing.assert_close(penalty, expected)
    for found, due in zip(torch.autograd.grad(penalty, A), torch.autograd.grad(expected, A), strict=True):
        torch.testing.assert_close(found + found.T, due + due.T)  # A's gradient has no one form


@pytest.mark.parametrize("norm", ["none", "group"])
@pytest.mark.parametrize("every", [1, 3])
def test_it_reaches_the_weights_of_a_network(norm, every):
    """Double backward through DCGAN, against a finite difference along a random direction of the weights."""
    torch.manual_seed(0)
    D = Discriminator(size=28, channels=1, width=4, norm=norm).double()
    real = torch.randn(3, 1, 28, 28, dtype=torch.float64)

    def penalty() -> Tensor:
        x = real.clone().requires_grad_()
        (g,) = torch.autograd.grad(D(x).sum(), x, create_graph=True)
        return 5.0 * g[::every].square().sum() / len(g[::every])

    weight, step = D.blocks[1].conv.weight, 1e-5
    direction = torch.randn_like(weight)
    seen = judged(D, real)
    (gradient,) = torch.autograd.grad(Slope("r1", "real", 10.0, every=every)(seen, seen), weight)
    with torch.no_grad():
        weight += step * direction
    above = penalty().item()
    with torch.no_grad():
        weight -= 2 * step * direction
    below = penalty().item()
    assert (gradient * direction).sum().item() == pytest.approx((above - below) / (2 * step), rel=1e-4)


@pytest.mark.parametrize("sided", [1, 2])
@pytest.mark.parametrize("every", [1, 2])
def test_the_finite_difference_of_a_linear_discriminator_is_exact_for_each_noise(monkeypatch, sided, every):
    torch.manual_seed(0)
    w, real = torch.randn(48, dtype=torch.float64, requires_grad=True), torch.randn(6, 3, 4, 4).double()
    drawn = torch.randn(6 // every, 3, 4, 4).double()
    monkeypatch.setattr(gradient_penalty, "noise", lambda *_: drawn)
    seen = judged(lambda x: x.flatten(1) @ w, real, differentiate=False)
    penalty = Slope("r1", "real", GAMMA, every=every, sigma=0.3, sided=sided)(seen, seen)
    torch.testing.assert_close(penalty, GAMMA / 2 * (drawn.flatten(1) @ w).square().mean())
    torch.testing.assert_close(
        torch.autograd.grad(penalty, w)[0],
        GAMMA * ((drawn.flatten(1) @ w)[:, None] * drawn.flatten(1)).mean(0),
    )


def test_the_finite_difference_estimates_the_exact_penalty():
    torch.manual_seed(0)
    w, images = torch.randn(9), torch.zeros(100_000, 1, 3, 3)
    seen = judged(lambda x: x.flatten(1) @ w, images, differentiate=False)
    estimate = Slope("r2", "fake", GAMMA, sigma=0.1)(seen, seen)
    assert estimate.item() == pytest.approx(GAMMA / 2 * w.square().sum().item(), rel=0.01)


def test_the_finite_difference_of_an_image_is_of_its_z_alone():
    """Whatever ranks and rounds it is in; runs from before have noise of the generator's."""
    torch.manual_seed(0)
    D = Discriminator(size=28, channels=1, width=4, norm="none")
    images, z = torch.randn(8, 1, 28, 28), torch.randn(8, 5)
    penalty = Slope("r1", "real", 1.0, every=2, sigma=0.1)
    seen = [judged(D, images[part], differentiate=False) for part in (slice(8), slice(4), slice(4, 8))]
    whole, first, last = (
        penalty(each, each, None, z[part]).item()
        for each, part in zip(seen, (slice(8), slice(4), slice(4, 8)), strict=True)
    )
    assert whole == pytest.approx((first + last) / 2, rel=1e-5)
    assert penalty(seen[0], seen[0], None, z).item() == pytest.approx(whole, rel=1e-5)
    assert len({penalty(seen[0], seen[0]).item() for _ in range(2)}) == 2


def test_two_sides_cancel_curvature_and_one_side_does_not():
    """D(x) = ‖x‖² at x = 0 has no slope, but one-sided ΔD/σ = σ‖ε‖²."""
    seen = judged(lambda x: x.square().sum((1, 2, 3)), torch.zeros(64, 1, 8, 8), differentiate=False)
    one, two = (Slope("r1", "real", 2.0, sigma=0.1, sided=sided)(seen, seen).item() for sided in (1, 2))
    assert two == pytest.approx(0, abs=1e-8) and one == pytest.approx(0.01 * 64 * 66, rel=0.1)


def test_only_the_exact_form_differentiates_twice_and_only_on_all_images_the_first_pass():
    exact = Slope("r1", "real", 1.0)
    assert exact.twice and exact.needs == "real"
    assert replace(exact, every=4).twice and replace(exact, every=4).needs is None
    assert not replace(exact, sigma=0.1).twice and replace(exact, sigma=0.1).needs is None
    assert not replace(exact, factor=0).twice and replace(exact, factor=0).needs is None


def test_every_version_of_an_image_keeps_its_label_and_augmentation():
    """D(x, c) = c·x of one pixel, moved by its augmentation: the logits say what a penalty's own pass saw."""
    images, c = torch.arange(6.0).view(6, 1, 1, 1), torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    moves = torch.tensor([[0.1], [0.2], [0.3], [0.4], [0.5], [0.6]])
    seen = judge(
        lambda x, labels: x.flatten() * labels, lambda x, m: x + m.view(-1, 1, 1, 1), images, c, moves, False
    )
    torch.testing.assert_close(seen.logits, c * (images + moves.view(-1, 1, 1, 1)).flatten())
    chosen = images[::2]
    found = seen.again(torch.cat([chosen + 10, chosen - 10]), 2)
    expected = torch.cat([c[::2] * (chosen.flatten() + by + moves[::2, 0]) for by in (10, -10)])
    torch.testing.assert_close(found, expected)


def test_a_penalty_counts_its_factor_times_and_not_at_all_when_it_is_not_due():
    seen = judged(lambda x: x.square().sum((1, 2, 3)), torch.randn(4, 1, 2, 2))
    due, once = (Slope("r1", "real", 2.0, factor=factor)(seen, seen) for factor in (3, 1))
    torch.testing.assert_close(due, 3 * once)
    idle = Slope("r1", "real", 2.0, factor=0)(
        judged(lambda x: x.sum((1, 2, 3)), torch.ones(4, 1, 2, 2), False), seen
    )
    assert idle.item() == 0.0 and idle.shape == () and idle.dtype == torch.float32


def test_wgan_gp_of_a_linear_discriminator():
    torch.manual_seed(0)
    w = torch.randn(12, dtype=torch.float64, requires_grad=True)
    real, fake = torch.randn(2, 5, 3, 2, 2, dtype=torch.float64)
    penalty = Interpolated(10.0)(*both(lambda x: x.flatten(1) @ w, real, fake), torch.rand(5))
    torch.testing.assert_close(penalty, 10 * (w.norm() - 1) ** 2)
    torch.testing.assert_close(torch.autograd.grad(penalty, w)[0], 20 * (w.norm() - 1) * (w / w.norm()))


def test_wgan_gp_looks_between_the_ith_fake_and_the_ith_real():
    """D(x) = ½x² of one pixel has the slope x̂ itself."""
    real, fake = torch.tensor([3.0, 5.0]).view(2, 1, 1, 1), torch.tensor([2.0, 9.0]).view(2, 1, 1, 1)
    mix = torch.tensor([0.0, 0.25])
    penalty = Interpolated(1.0)(*both(lambda x: 0.5 * x.square().flatten(), real, fake), mix)
    assert penalty.item() == pytest.approx(((2 - 1) ** 2 + (0.25 * 5 + 0.75 * 9 - 1) ** 2) / 2)


def test_wgan_gp_takes_fakes_of_lower_precision():
    real, fake, mix = torch.randn(3, 1, 1, 1), torch.randn(3, 1, 1, 1).bfloat16(), torch.rand(3)

    def penalty(fake):
        return Interpolated(1.0)(*both(lambda x: 0.5 * x.square().flatten(), real, fake), mix)

    assert torch.equal(penalty(fake), penalty(fake.float()))


def test_wgan_gp_is_finite_where_D_is_flat():
    w = torch.zeros(4, requires_grad=True)
    seen = judged(lambda x: x.flatten(1) @ w, torch.randn(3, 1, 2, 2))
    penalty = Interpolated(10.0)(seen, seen, torch.rand(3))
    assert penalty.item() == pytest.approx(10, rel=1e-4)
    assert torch.autograd.grad(penalty, w)[0].isfinite().all()
