"""Penalties on D's gradient with respect to images."""

from __future__ import annotations

import torch
from torch import Tensor


def r1(real: Tensor, real_logits: Tensor, gamma: float) -> Tensor:
    """(γ/2) E‖∇D(x)‖²: R1 of Mescheder et al. 2018, eq. 9.

    real [N,C,H,W], requiring a gradient, and real_logits [N], computed from it: the forward of the
    adversarial term serves both, so that spectral norm takes no extra power iteration. Returns a float32
    scalar that can be differentiated again. The squared norm is summed over an image's pixels and averaged
    over images. Under batch norm, where one image's logit depends on the others, the gradient is that of
    the sum of the logits, as is customary. The caller applies the factor of lazy regularisation.
    """
    (gradient,) = torch.autograd.grad(real_logits.sum(), real, create_graph=True)
    return 0.5 * gamma * gradient.float().square().flatten(1).sum(1).mean()
