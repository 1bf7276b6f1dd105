"""Batch normalisation over the images of all ranks, differentiable any number of times."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation (Ioffe & Szegedy 2015, algorithm 1) of features [N, C, H, W] over N, H and W of all
    ranks; returns what it is given, shape, dtype and memory layout.

    In eval mode and in a world of one it is nn.BatchNorm2d. Over several ranks, each with equally many
    images, statistics are float32 or wider, and running ones equal on all ranks. torch.nn.SyncBatchNorm needs
    CUDA and cannot be differentiated twice.
    """

    _world = 1
    _mean_over_ranks: Callable[[Tensor], Tensor]

    def share(self, world: int, mean_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Normalise over `world` ranks from now on. mean_over_ranks: a tensor of equal shape on each rank →
        its elementwise mean; differentiable as a function of the tensors of all ranks."""
        self._world, self._mean_over_ranks = world, mean_over_ranks

    def forward(self, x: Tensor) -> Tensor:
        if self._world == 1 or not self.training:
            return super().forward(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
        # One collective for both moments. float64 keeps the variance exact where the mean is far from 0.
        mean, var = mean.double(), var.double()
        mean, square = self._mean_over_ranks(torch.stack([mean, var + mean.square()])).unbind()
        var = square - mean.square()
        self._remember(mean, var, count=self._world * x.numel() // x.shape[1])
        scale = self.weight * torch.rsqrt(var + self.eps)
        shift = self.bias - mean * scale
        scale, shift = (t.to(wide.dtype).view(-1, 1, 1) for t in (scale, shift))
        return torch.addcmul(shift, wide, scale).to(x.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, var: Tensor, count: int) -> None:
        """Move the running statistics; count: elements per channel, on all ranks."""
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        unbiased = var * (count / max(count - 1, 1))
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
