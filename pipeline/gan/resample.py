"""Images and features at twice or half the size, by the filter [1, 3, 3, 1] along both axes.

It is [1, 1] three times over, and a mean over 2×2 pixels is [1, 1] along both axes. So there is no kernel to
store, shard or send. Beyond the border there are zeros.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def enlarge(x: Tensor) -> Tensor:
    """[N,C,H,W] → [N,C,2H,2W]: zeros in between, then [1, 3, 3, 1]/4. Bilinear, but for the border."""
    larger: Tensor = _Enlarged.apply(x)  # type: ignore[no-untyped-call]
    return larger


class Doubled(nn.Module):
    """[N,C,H,W] → [N,C,2H,2W]: every pixel four times, in its own dtype, which is exact. On GPUs autocast
    would widen it to float32, and with it all that is added to it."""

    def forward(self, x: Tensor) -> Tensor:
        return _doubled(x)


def _doubled(x: Tensor) -> Tensor:
    device = x.device.type
    known = torch.amp.is_autocast_available(device)  # meta has none
    with torch.autocast(device, enabled=False) if known else nullcontext():
        return F.interpolate(x, scale_factor=2, mode="nearest")


def shrink(x: Tensor) -> Tensor:
    """[N,C,2H,2W] → [N,C,H,W]: [1, 3, 3, 1]/8, then every second pixel. Bilinear with antialiasing, but for
    the border."""
    smaller: Tensor = _Shrunk.apply(x)  # type: ignore[no-untyped-call]
    return smaller


def smooth(x: Tensor, border: int) -> Tensor:
    """[N,C,H,W] → [N,C,H + 2·border − 3,…]: [1, 3, 3, 1]/8, with 1 or 2 zeros added on every side."""
    smoothed: Tensor = _Smoothed.apply(x, border)  # type: ignore[no-untyped-call]
    return smoothed


# Each is a multiple of the other's adjoint. So a backward is the other's forward, however often one
# differentiates; those of pooling are several times slower on a CPU.


class _Enlarged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        doubled = _doubled(_channels_last(x))
        return F.avg_pool2d(F.avg_pool2d(doubled, 2, stride=1, padding=1), 2, stride=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 4 * shrink(gradient)


class _Shrunk(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        smooth = F.avg_pool2d(F.avg_pool2d(_channels_last(x), 2, stride=1, padding=1), 2, stride=1)
        return F.avg_pool2d(smooth, 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return enlarge(gradient) / 4


class _Smoothed(torch.autograd.Function):
    """Its adjoint is itself, with the border that restores the size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, border: int) -> Tensor:
        ctx.border = border
        x = F.avg_pool2d(_channels_last(x), 2, stride=1, padding=1)
        return F.avg_pool2d(F.avg_pool2d(x, 2, stride=1, padding=border - 1), 2, stride=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return smooth(gradient, 3 - ctx.border), None


def _channels_last(x: Tensor) -> Tensor:
    """In the only memory format in which pooling is fast on a CPU."""
    return x.contiguous(memory_format=torch.channels_last)
