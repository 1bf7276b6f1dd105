"""Floating-point operations of the networks, counted without computing, and of training with them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config import R1, Config
from pipeline.gan.networks import build_D, build_G
from pipeline.gan.schedules import is_used


class Flops(NamedTuple):
    """Of a forward pass for one image: those of convolutions and matrix products, two per multiply-add."""

    G: float
    D: float
    frozen: float = 0.0  # of D's: those of layers that do not train


def forward(config: Config, num_classes: int) -> Flops:
    """FLOPs of G's and D's forward pass."""
    # torch's counter knows plain products but not the CPU's fused attention.
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH):
        G, D = (build(config, num_classes) for build in (build_G, build_D))
        frozen = list(_frozen(D, type(D).__name__))
        z, c = torch.zeros(2, config.G.z_dim), torch.zeros(2, dtype=torch.int64) if num_classes else None
        with torch.no_grad(), FlopCounterMode(display=False) as of_G:
            images = G.requires_grad_(False)(z, c)
        with torch.no_grad(), FlopCounterMode(display=False) as of_D:
            D.requires_grad_(False)(images, c)
    parts = of_D.get_flop_counts()
    of_frozen = sum(sum(parts[name].values()) for name in frozen if name in parts)
    return Flops(of_G.get_total_flops() / 2, of_D.get_total_flops() / 2, of_frozen / 2)


def _frozen(module: nn.Module, name: str) -> Iterator[str]:
    """Names, as torch's counter has them, of the outermost modules whose parameters all do not train."""
    training = [p.requires_grad for p in module.parameters()]
    if training and not any(training):
        yield name
        return
    for child, inner in module.named_children():
        yield from _frozen(inner, f"{name}.{child}")


def of_training(config: Config, G: float, D: float, frozen: float = 0.0) -> float:
    """FLOPs of training per real image shown to D, given those of `forward`; lazy penalties at their average.

    A backward pass is two forward passes, or one if it differentiates with respect to images alone; that of a
    first layer is less, so networks of few layers take less than this. Checkpointing runs each pass once
    more whenever it is differentiated.
    """
    steps, penalty = config.loss.D_steps, config.penalty
    again_G, again_D = int(config.G.checkpoint), int(config.D.checkpoint)
    turn_of_D = G + _turn(config, again_D, trains=True) * (D - frozen)
    turn_of_D += _turn(config, again_D, trains=False) * frozen
    turn_of_G = (3 + again_G) * G + (2 + again_D + (config.loss.kind == "relativistic")) * D
    turn_of_G += (3 + again_G) / penalty.path.interval * G if penalty.path.weight else 0.0
    return turn_of_D + turn_of_G / steps


def _turn(config: Config, again: int, trains: bool) -> float:
    """Of D's turn, in forward passes of layers that train, or of frozen ones next to the image.

    A gradient of logits is one, and differentiating it is two; a pass of the penalty's own is three, as every
    other. Frozen layers need a backward only where a penalty differentiates through them, that for images,
    whose own has both halves in convolutions.
    """
    penalty = config.penalty
    plain, exact, own = (3 + again, 3 + again, 6 + 2 * again) if trains else (1, 4 + 2 * again, 5 + 2 * again)

    def slope(given: R1) -> float:
        if not is_used(given.gamma):
            return 0.0
        if given.sigma:
            passes = 2 * plain * given.fraction
        else:
            passes = exact if given.fraction == 1 else own * given.fraction
        return passes / given.interval

    return 2 * plain + slope(penalty.r1) + slope(penalty.r2) + own * (penalty.wgan_gp.weight > 0)


def in_flops(count: float) -> str:
    """In MFLOP, GFLOP or TFLOP, to three digits."""
    units = ((1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"))
    size, unit = next((given for given in units if count >= given[0]), units[-1])
    return f"{count / size:.3g} {unit}"
