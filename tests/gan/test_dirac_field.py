"""The Dirac-GAN's gradient field at its fixed point (Mescheder et al. 2018, section 3): G puts all its mass
on θ, D(x) = ψx, the data is at 0. Its eigenvalues say whether training converges."""

from __future__ import annotations

import cmath

import pytest
import torch
from torch import Tensor

from pipeline.gan.gradient_penalty import Slope, judge
from pipeline.gan.losses import adversarial


def field(kind: str, gamma: float, penalties: tuple[str, ...], point: Tensor) -> Tensor:
    """(−∂L_G/∂θ, −∂L_D/∂ψ) at point = (θ, ψ)."""
    theta, psi = point
    losses, data = adversarial(kind), torch.zeros(1, 1, 1, 1, dtype=point.dtype)
    fakes = theta.expand(1, 1, 1, 1)
    real, fake = (
        judge(lambda x, _: psi * x.flatten(), lambda x, _: x, images, None, None, True)
        for images in (data, fakes.clone() if fakes.requires_grad else fakes)
    )
    L_D = losses.d(real.logits, fake.logits)
    for on in penalties:
        L_D = L_D + Slope(on, on, gamma)(real, fake)
    (of_D,) = torch.autograd.grad(L_D, psi, create_graph=True)
    L_G = losses.g(psi * fakes.flatten(), real.logits)
    (of_G,) = torch.autograd.grad(L_G, theta, create_graph=True)
    return -torch.stack([of_G, of_D])


@pytest.mark.parametrize("kind", ["minimax", "nonsaturating", "relativistic"])
@pytest.mark.parametrize("gamma", [0.1, 0.4, 1.5])
@pytest.mark.parametrize("penalties", [(), ("real",), ("real", "fake")], ids=["none", "r1", "r1-r2"])
def test_its_eigenvalues_are_those_of_the_closed_form(kind, gamma, penalties):
    """Without penalties ±i/2: it turns for ever. R1: −γ/2 ± √(γ²/4 − ¼). R1 and R2: −γ ± √(γ² − ¼)."""
    at_rest = torch.zeros(2, dtype=torch.float64)
    J = torch.autograd.functional.jacobian(
        lambda point: field(kind, gamma, penalties, point), at_rest, create_graph=False
    )
    found = sorted(torch.linalg.eigvals(J).tolist(), key=lambda v: (v.real, v.imag))
    half = gamma * len(penalties) / 2
    root = cmath.sqrt(half**2 - 0.25)
    expected = sorted((-half - root, -half + root), key=lambda v: (v.real, v.imag))
    for value, due in zip(found, expected, strict=True):
        assert abs(value - due) < 1e-9
