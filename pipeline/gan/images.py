"""Between stored images, uint8 in [0, 255], and the networks' floats in [-1, 1]."""

from __future__ import annotations

import torch
from torch import Tensor


def to_float(images: Tensor) -> Tensor:
    """uint8 [N, C, H, W] → float32 in [-1, 1], the same shape, channels last in memory."""
    return images.to(torch.float32, memory_format=torch.channels_last).div_(127.5).sub_(1)
