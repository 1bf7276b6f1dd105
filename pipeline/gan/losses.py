"""The adversarial losses, from logits. Weight penalties are not here: they act on shards, in parallel/.

Logits of less than float32 are promoted to it; float64 stays float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import relu, softplus

from pipeline.gan.precision import wide


@dataclass(frozen=True)
class Adversarial:
    """What each player minimises: from logits [N] of any float dtype to a scalar of at least float32, the
    mean."""

    d: Callable[[Tensor, Tensor], Tensor]  # (real_logits, fake_logits) → L_D
    g: Callable[[Tensor, Tensor | None], Tensor]  # (fake_logits, real_logits if paired) → L_G
    paired: bool = False  # whether the i-th fake is compared with the i-th real, of the same label


def adversarial(kind: str) -> Adversarial:
    """The two losses named `kind` in the config (`loss.kind`)."""
    return _KINDS[kind]


def _log_loss_d(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """−E[log σ(D(x))] − E[log(1 − σ(D(G(z))))]: Goodfellow et al. 2014, eq. 1, as D minimises it.

    softplus(−a) = −log σ(a) and softplus(a) = −log(1 − σ(a)), exact where σ would round to 0 or 1.
    """
    return softplus(-wide(real_logits)).mean() + softplus(wide(fake_logits)).mean()


def _minimax_g(fake_logits: Tensor, _: Tensor | None = None) -> Tensor:
    """E[log(1 − σ(D(G(z))))]: Goodfellow et al. 2014, eq. 1. Its gradient vanishes where D is sure."""
    return -softplus(wide(fake_logits)).mean()


def _nonsaturating_g(fake_logits: Tensor, _: Tensor | None = None) -> Tensor:
    """−E[log σ(D(G(z)))]: Goodfellow et al. 2014, section 3, the same fixed point with strong gradients."""
    return softplus(-wide(fake_logits)).mean()


def _hinge_d(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """E[max(0, 1 − D(x))] + E[max(0, 1 + D(G(z)))]: Lim & Ye 2017; Miyato et al. 2018, eq. 16."""
    return relu(1 - wide(real_logits)).mean() + relu(1 + wide(fake_logits)).mean()


def _hinge_g(fake_logits: Tensor, _: Tensor | None = None) -> Tensor:
    """−E[D(G(z))]: Miyato et al. 2018, eq. 17."""
    return -wide(fake_logits).mean()


def _least_squares_d(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """½E[(D(x) − 1)²] + ½E[D(G(z))²]: Mao et al. 2017, eq. 9 (a = 0, b = c = 1)."""
    return 0.5 * ((wide(real_logits) - 1).square().mean() + wide(fake_logits).square().mean())


def _least_squares_g(fake_logits: Tensor, _: Tensor | None = None) -> Tensor:
    """½E[(D(G(z)) − 1)²]: Mao et al. 2017, eq. 9."""
    return 0.5 * (wide(fake_logits) - 1).square().mean()


def _wasserstein_d(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """−E[D(x)] + E[D(G(z))]: Arjovsky et al. 2017, eq. 3. D is to be 1-Lipschitz, which `penalty.wgan_gp`
    asks of it. G's is the hinge loss's."""
    return wide(fake_logits).mean() - wide(real_logits).mean()


def _relativistic_d(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """−E[log σ(D(x) − D(G(z)))] over pairs: Jolicoeur-Martineau 2018, eq. 4; Huang et al. 2024, eq. 2."""
    return softplus(wide(fake_logits) - wide(real_logits)).mean()


def _relativistic_g(fake_logits: Tensor, real_logits: Tensor | None) -> Tensor:
    """−E[log σ(D(G(z)) − D(x))] over pairs, D(x) a constant: the same, for G."""
    assert real_logits is not None
    return softplus(wide(real_logits) - wide(fake_logits)).mean()


_KINDS: dict[str, Adversarial] = {
    "minimax": Adversarial(_log_loss_d, _minimax_g),
    "nonsaturating": Adversarial(_log_loss_d, _nonsaturating_g),
    "hinge": Adversarial(_hinge_d, _hinge_g),
    "least_squares": Adversarial(_least_squares_d, _least_squares_g),
    "wasserstein": Adversarial(_wasserstein_d, _hinge_g),
    "relativistic": Adversarial(_relativistic_d, _relativistic_g, paired=True),
}
