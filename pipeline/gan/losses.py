"""The adversarial losses, from logits. Weight penalties are not here: they act on shards, in parallel/."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import relu, softplus


@dataclass(frozen=True)
class Adversarial:
    """What each player minimises: from logits [N] of any float dtype to a float32 scalar, the mean."""

    d: Callable[[Tensor, Tensor], Tensor]  # (real_logits, fake_logits) → L_D
    g: Callable[[Tensor, Tensor | None], Tensor]  # (fake_logits, real_logits if paired) → L_G
    paired: bool = False  # whether G's loss needs real_logits: the i-th fake is compared with the i-th real


def adversarial(kind: str) -> Adversarial:
    """The two losses named `kind` in the config (`loss.kind`)."""
    return _KINDS[kind]


def _log_loss_d(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """−E[log σ(D(x))] − E[log(1 − σ(D(G(z))))]: Goodfellow et al. 2014, eq. 1, as D minimises it.

    softplus(−a) = −log σ(a) and softplus(a) = −log(1 − σ(a)), exact where σ would round to 0 or 1.
    """
    return softplus(-real_logits.float()).mean() + softplus(fake_logits.float()).mean()


def _minimax_g(fake_logits: Tensor, _: Tensor | None = None) -> Tensor:
    """E[log(1 − σ(D(G(z))))]: Goodfellow et al. 2014, eq. 1. Its gradient vanishes where D is sure."""
    return -softplus(fake_logits.float()).mean()


def _nonsaturating_g(fake_logits: Tensor, _: Tensor | None = None) -> Tensor:
    """−E[log σ(D(G(z)))]: Goodfellow et al. 2014, section 3, the same fixed point with strong gradients."""
    return softplus(-fake_logits.float()).mean()


def _hinge_d(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """E[max(0, 1 − D(x))] + E[max(0, 1 + D(G(z)))]: Lim & Ye 2017; Miyato et al. 2018, eq. 16."""
    return relu(1 - real_logits.float()).mean() + relu(1 + fake_logits.float()).mean()


def _hinge_g(fake_logits: Tensor, _: Tensor | None = None) -> Tensor:
    """−E[D(G(z))]: Miyato et al. 2018, eq. 17."""
    return -fake_logits.float().mean()


def _least_squares_d(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """½E[(D(x) − 1)²] + ½E[D(G(z))²]: Mao et al. 2017, eq. 9 (a = 0, b = c = 1)."""
    return 0.5 * ((real_logits.float() - 1).square().mean() + fake_logits.float().square().mean())


def _least_squares_g(fake_logits: Tensor, _: Tensor | None = None) -> Tensor:
    """½E[(D(G(z)) − 1)²]: Mao et al. 2017, eq. 9."""
    return 0.5 * (fake_logits.float() - 1).square().mean()


_KINDS: dict[str, Adversarial] = {
    "minimax": Adversarial(_log_loss_d, _minimax_g),
    "nonsaturating": Adversarial(_log_loss_d, _nonsaturating_g),
    "hinge": Adversarial(_hinge_d, _hinge_g),
    "least_squares": Adversarial(_least_squares_d, _least_squares_g),
}
