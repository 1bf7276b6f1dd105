"""BatchNorm over ranks: each rank has its own running statistics; copies of a network get them pooled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.parallel.ranks import Ranks


def has_batch_norm(module: nn.Module) -> bool:
    """Whether the network's output depends on the other images in its rank's batch."""
    return any(isinstance(m, _BatchNorm) for m in module.modules())


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
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None
    ]
    return [(f"{prefix}running_mean", f"{prefix}running_var") for prefix in prefixes]
