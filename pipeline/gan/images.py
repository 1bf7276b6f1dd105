"""Conversion between stored images, uint8 in [0, 255], and the networks' floats in [-1, 1]."""

from __future__ import annotations

import torch
from torch import Tensor


def to_float(images: Tensor) -> Tensor:
    """uint8 [N, C, H, W] → float32 in [-1, 1], the same shape, channels last in memory."""
    return images.to(torch.float32, memory_format=torch.channels_last).div_(127.5).sub_(1)


def to_uint8(images: Tensor) -> Tensor:
    """Generated images, float in [-1, 1] → uint8 in [0, 255], the same shape; for grids and scores alike.

    Rounds to the nearest level, clamps values outside the range, turns NaN into 0.
    """
    return (images.float() * 127.5 + 127.5).nan_to_num(nan=0.0).round().clamp(0, 255).to(torch.uint8)
