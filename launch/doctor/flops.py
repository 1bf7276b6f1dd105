"""Floating-point operations of the networks, counted without computing, and of training with them."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config import R1, Config
from pipeline.gan.networks import build_D, build_G
from pipeline.gan.schedules import is_used


def forward(config: Config, num_classes: int) -> tuple[float, float]:
    """FLOPs of G's and D's forward pass for one image: those of convolutions and matrix products, two per
    multiply-add."""
    # torch's counter knows plain products but not the CPU's fused attention.
    with FakeTensorMode(), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        G, D = (build(config, num_classes).requires_grad_(False) for build in (build_G, build_D))
        z, c = torch.zeros(2, config.G.z_dim), torch.zeros(2, dtype=torch.int64) if num_classes else None
        with FlopCounterMode(display=False) as of_G:
            images = G(z, c)
        with FlopCounterMode(display=False) as of_D:
            D(images, c)
    return of_G.get_total_flops() / 2, of_D.get_total_flops() / 2


def of_training(config: Config, G: float, D: float) -> float:
    """FLOPs of training per real image shown to D, given those of `forward`; lazy penalties at their average.

    A backward pass is two forward passes, or one if it differentiates with respect to images alone; that of a
    first layer is less, so networks of few layers take less than this. Checkpointing runs each pass with a
    gradient once more.
    """
    steps, penalty = config.loss.D_steps, config.penalty
    again_G, again_D = int(config.G.checkpoint), int(config.D.checkpoint)
    turn_of_D = G + (2 * (3 + again_D) + _penalties(config, again_D)) * D
    turn_of_G = (3 + again_G) * G + (2 + again_D + (config.loss.kind == "relativistic")) * D
    turn_of_G += 3 / penalty.path.interval * G if penalty.path.weight else 0.0
    return turn_of_D + turn_of_G / steps


def _penalties(config: Config, again: int) -> float:
    """Of D's turn, in its forward passes. A gradient of logits is one, and differentiating it is two; a pass
    of the penalty's own is three, as every other."""
    penalty = config.penalty

    def slope(given: R1) -> float:
        if not is_used(given.gamma):
            return 0.0
        if given.sigma:
            passes = 2 * (3 + again) * given.fraction
        else:
            passes = 3.0 if given.fraction == 1 else (6 + again) * given.fraction
        return passes / given.interval

    return slope(penalty.r1) + slope(penalty.r2) + (6 + again) * (penalty.wgan_gp.weight > 0)


def in_flops(count: float) -> str:
    """In MFLOP, GFLOP or TFLOP, to three digits."""
    units = ((1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"))
    size, unit = next((given for given in units if count >= given[0]), units[-1])
    return f"{count / size:.3g} {unit}"
