"""Conversion between stored images, uint8 in [0, 255], and the networks' floats in [-1, 1].

Latents are floats in the shards too, and are taken as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def is_channels_last(network: nn.Module) -> bool:
    """Whether kernels and images are channels last in memory, as GPUs compute convolutions fastest: if the
    network's class says so, `channels_last = True`. Others may take them apart with `view`."""
    return bool(getattr(network, "channels_last", False))


def to_float(images: Tensor) -> Tensor:
    """uint8 [N, C, H, W] → float32 in [-1, 1], the same shape, channels last in memory; latents, float32,
    with their values. Always a new tensor, which may be differentiated with respect to."""
    floats = images.to(torch.float32, copy=True, memory_format=torch.channels_last)
    return floats if images.is_floating_point() else floats.div_(127.5).sub_(1)


def to_uint8(images: Tensor) -> Tensor:
    """Generated images, float in [-1, 1] → uint8 in [0, 255], the same shape; for grids and scores alike.

    Rounds to the nearest level, clamps values outside the range, turns NaN into 0.
    """
    return (images.float() * 127.5 + 127.5).nan_to_num(nan=0.0).round().clamp(0, 255).to(torch.uint8)
