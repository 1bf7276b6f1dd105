"""BatchNorm over ranks.

`norm: batch` normalises over one rank's images: each rank has its own running statistics, and copies of a
network get them pooled. `norm: sync_batch` normalises over all ranks' images of a round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import FunctionCtx
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.gan.sync_batch_norm import SyncBatchNorm2d
from pipeline.parallel.ranks import Ranks


def has_batch_norm(module: nn.Module) -> bool:
    """Whether the network's output depends on the other images in its rank's batch, and on no others."""
    return any(_of_one_rank(layer) for layer in module.modules())


def has_sync_batch_norm(module: nn.Module) -> bool:
    """Whether the network's output depends on the images of all ranks in a round."""
    return any(isinstance(layer, SyncBatchNorm2d) for layer in module.modules())


def synchronise(module: nn.Module, world: int) -> None:
    """Let the network's sync_batch layers normalise over all ranks' images.

    Each sends two numbers per channel in a forward and in a backward, and four in a backward that is itself
    differentiated. They share the group of the gradients. The order of collectives is the same on all ranks:
    forwards by the code; backwards because autograd orders the nodes of a graph by when they were made
    (gan/second_order.py), and all ranks make the same graph.
    """
    for layer in module.modules() if world > 1 else ():
        if isinstance(layer, SyncBatchNorm2d):
            layer.share(world, _mean_over_ranks)


class _MeanOverRanks(torch.autograd.Function):
    """y = (1/W) Σ_j x_j on every rank. As a map of all ranks' tensors it is linear and symmetric, so its
    backward, of the sum of all ranks' losses, is the mean over ranks of the gradients, and so on."""

    @staticmethod
    def forward(_: FunctionCtx, values: torch.Tensor) -> torch.Tensor:
        mean = values / dist.get_world_size()
        dist.all_reduce(mean)
        return mean

    @staticmethod
    def backward(_: FunctionCtx, *gradients: torch.Tensor) -> torch.Tensor:
        return _mean_over_ranks(*gradients)


def _mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    mean: torch.Tensor = _MeanOverRanks.apply(values)  # type: ignore[no-untyped-call]
    return mean


def pooled(module: nn.Module, per_rank: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Every rank's buffers → one network's: BatchNorm's statistics pooled, others from the first rank.

    The pooled mean is the mean of the means; the pooled variance is the mean of the variances plus the
    variance of the means (the law of total variance, equal batches per rank). In fp64.
    """
    buffers = dict(per_rank[0])
    for mean, var in _running_statistics(module) if len(per_rank) > 1 else ():
        means = torch.stack([b[mean].double() for b in per_rank])
        variances = torch.stack([b[var].double() for b in per_rank])
        buffers[mean] = means.mean(0).to(buffers[mean].dtype)
        buffers[var] = (variances.mean(0) + means.var(0, correction=0)).to(buffers[var].dtype)
    return buffers


def pooled_buffers(module: nn.Module, ranks: Ranks) -> dict[str, torch.Tensor]:
    """`pooled` over the ranks of this run. Collective: one gather of the statistics."""
    mine = {name: buffer.detach() for name, buffer in module.named_buffers()}
    names = [name for pair in _running_statistics(module) for name in pair]
    if not names or ranks.world == 1:
        return mine
    flat = ranks.gather(torch.cat([mine[name] for name in names])[None])
    parts = [row.split([mine[name].numel() for name in names]) for row in flat]
    return pooled(module, [mine | dict(zip(names, part, strict=True)) for part in parts])


def _running_statistics(module: nn.Module) -> list[tuple[str, str]]:
    """Names of the running mean and variance of every BatchNorm layer."""
    prefixes = [
        f"{prefix}." if prefix else ""
        for prefix, layer in module.named_modules()
        if _of_one_rank(layer) and layer.running_mean is not None
    ]
    return [(f"{prefix}running_mean", f"{prefix}running_var") for prefix in prefixes]


def _of_one_rank(layer: nn.Module) -> bool:
    return isinstance(layer, _BatchNorm) and not isinstance(layer, SyncBatchNorm2d)
