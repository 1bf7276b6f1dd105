"""R1 against gradients worked out by hand."""

import pytest
import torch
from torch import nn

from pipeline.gan.dcgan import Discriminator
from pipeline.gan.gradient_penalty import GradientPenalty, r1


def test_linear_discriminator_has_the_gradient_of_its_kernel():
    torch.manual_seed(0)
    D, gamma = nn.Linear(3 * 5 * 5, 1), 4.0
    real = torch.randn(6, 3, 5, 5, requires_grad=True)
    penalty = r1(real, D(real.flatten(1)).flatten(), gamma)
    torch.testing.assert_close(penalty, gamma / 2 * D.weight.square().sum())
    (slope,) = torch.autograd.grad(penalty, D.weight)
    torch.testing.assert_close(slope, gamma * D.weight)


def test_quadratic_discriminator():
    """D(x) = a‖x‖² has ∇D = 2ax: R1 = (γ/2) 4a² E‖x‖², dR1/da = 4γa E‖x‖²; E is over images alone."""
    torch.manual_seed(0)
    a, gamma = torch.tensor(0.3, requires_grad=True), 10.0
    real = torch.randn(8, 1, 4, 4, requires_grad=True)
    mean_square = real.detach().square().sum((1, 2, 3)).mean()
    penalty = r1(real, a * real.square().sum((1, 2, 3)), gamma)
    assert penalty.shape == () and penalty.dtype == torch.float32
    torch.testing.assert_close(penalty, gamma / 2 * 4 * a**2 * mean_square)
    (slope,) = torch.autograd.grad(penalty, a)
    torch.testing.assert_close(slope, 4 * gamma * a * mean_square)


@pytest.mark.parametrize("norm", ["none", "group"])
def test_reaches_the_weights_of_a_real_network(norm):
    """Double backward through DCGAN, against a finite difference along a random direction of the weights."""
    torch.manual_seed(0)
    D = Discriminator(size=28, channels=1, width=4, norm=norm).double()
    real = torch.randn(3, 1, 28, 28, dtype=torch.float64, requires_grad=True)

    def penalty() -> torch.Tensor:
        (g,) = torch.autograd.grad(D(real).sum(), real, create_graph=True)
        return 5.0 * g.square().sum() / 3

    weight, step = D.blocks[1].conv.weight, 1e-5
    direction = torch.randn_like(weight)
    (gradient,) = torch.autograd.grad(r1(real, D(real), 10.0), weight)
    with torch.no_grad():
        weight += step * direction
    above = penalty().item()
    with torch.no_grad():
        weight -= 2 * step * direction
    below = penalty().item()
    assert (gradient * direction).sum().item() == pytest.approx((above - below) / (2 * step), rel=1e-4)


def test_a_penalty_counts_its_factor_times_and_not_at_all_when_it_is_not_due():
    real = torch.randn(4, 1, 2, 2, requires_grad=True)
    logits = real.square().sum((1, 2, 3))
    due = GradientPenalty("r1", "real", r1, gamma=2.0, factor=3)(real, logits)
    torch.testing.assert_close(due, 3 * r1(real, logits, 2.0))
    idle = GradientPenalty("r1", "real", r1, gamma=2.0, factor=0)(real.detach(), logits.detach())
    assert idle.item() == 0.0 and idle.shape == () and idle.dtype == torch.float32
