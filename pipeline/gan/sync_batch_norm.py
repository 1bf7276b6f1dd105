"""Batch normalisation over the images of all ranks, differentiable any number of times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.gan.precision import wide

_OF_CHANNEL = (0, 2, 3)  # the axes of [N, C, H, W] that statistics are over


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation (Ioffe & Szegedy 2015, algorithm 1) of features [N, C, H, W] over N, H and W of all
    ranks; returns their shape and dtype.

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
        out: Tensor = _Normalise.apply(x, self.weight, self.bias, self)  # type: ignore[no-untyped-call]
        return out

    def moments(self, x: Tensor) -> Tensor:
        """Mean and variance over all ranks, float64 [2, C]. One collective; float64, as otherwise the
        variance of features far from 0 would cancel."""
        var, mean = torch.stack(torch.var_mean(wide(x), _OF_CHANNEL, correction=0)).double()
        local = torch.stack([mean, torch.addcmul(var, mean, mean)])
        mean, square = self._mean_over_ranks(local)
        return torch.stack([mean, torch.addcmul(square, mean, mean, value=-1)])

    def mean_over_ranks(self, values: Tensor) -> Tensor:
        return self._mean_over_ranks(values)

    @torch.no_grad()
    def remember(self, mean: Tensor, var: Tensor, elements: int) -> None:
        """Move the running statistics; elements: per channel, on this rank."""
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        count = self._world * elements
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var * (count / max(count - 1, 1)), self.momentum)


class _Normalise(torch.autograd.Function):
    """(x − mean)/√(var + ε)·γ + β, over all ranks.

    Torch's kernels take the statistics of one rank for all there are. So the backward (Ioffe & Szegedy 2015,
    section 3) is written out, in operations that autograd differentiates.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, layer: SyncBatchNorm2d) -> Tensor:
        moments = layer.moments(x)
        mean, var = moments.to(weight.dtype)
        layer.remember(mean, var, elements=x.numel() // x.shape[1])
        ctx.layer = layer
        ctx.save_for_backward(x, weight, moments)
        return torch.native_batch_norm(x, weight, bias, mean, var, False, 0.0, layer.eps)[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), layer = gradients, ctx.layer
        x, weight, moments = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second derivative, which goes through the statistics too
            moments = layer.moments(x)
        x_wide = wide(x)
        mean, std = moments[0], torch.sqrt(moments[1] + layer.eps)
        mean, std = (t.to(x_wide.dtype).view(-1, 1, 1) for t in (mean, std))
        normal = (x_wide - mean) / std
        sums = torch.stack(
            [gradient.sum(_OF_CHANNEL, dtype=x_wide.dtype), (gradient * normal).sum(_OF_CHANNEL)]
        )
        of_bias, of_weight = sums
        if not ctx.needs_input_grad[0]:
            return None, of_weight, of_bias, None
        shift, slope = layer.mean_over_ranks(sums / (x.numel() // x.shape[1])).view(2, -1, 1, 1)
        of_x = (gradient - torch.addcmul(shift, normal, slope)) * (weight.view(-1, 1, 1) / std)
        return of_x.to(x.dtype), of_weight, of_bias, None
