"""Penalties on D's gradient with respect to images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class GradientPenalty:
    """One penalty as it counts in one D update."""

    name: str  # as in its chart, Loss/D/{name}_penalty
    on: Literal["real", "fake"]  # images
    function: Callable[[Tensor, Tensor, float], Tensor]  # (images, logits, γ) → float32 scalar
    gamma: float
    factor: int  # lazy regularisation: 0 where it is not due

    def __call__(self, images: Tensor, logits: Tensor) -> Tensor:
        """Its part of D's loss, a float32 scalar. images [N,C,H,W] require a gradient if it is due; logits
        [N] were computed from them."""
        if not self.factor:
            return torch.zeros((), device=logits.device)
        return self.factor * self.function(images, logits, self.gamma)


def r1(real: Tensor, real_logits: Tensor, gamma: float) -> Tensor:
    """(γ/2) E‖∇D(x)‖²: R1 of Mescheder et al. 2018, eq. 9.

    real [N,C,H,W], requiring a gradient, and real_logits [N], computed from it: the forward of the
    adversarial term serves both, so that spectral norm takes no extra power iteration. Returns a float32
    scalar that can be differentiated again. The squared norm is summed over an image's pixels and averaged
    over images. Under batch norm, where one image's logit depends on the others, the gradient is that of
    the sum of the logits, as is customary.
    """
    (gradient,) = torch.autograd.grad(real_logits.sum(), real, create_graph=True)
    return 0.5 * gamma * gradient.float().square().flatten(1).sum(1).mean()
