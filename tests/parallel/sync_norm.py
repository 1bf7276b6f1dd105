"""Batch normalisation over all ranks, beside torch's own over all of the images in one process."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from wire import Wire

from pipeline.gan.sync_batch_norm import SyncBatchNorm2d
from pipeline.parallel.batch_norm import synchronise
from pipeline.parallel.ranks import Ranks

_IMAGES = 4  # per rank


def record(ranks: Ranks) -> dict[str, Any]:
    """For each dtype and what is computed: the largest error on any rank. And the collectives of a pass in
    eval mode, and whether running statistics have the same bits on all ranks."""
    found: dict[str, Any] = {}
    for dtype in (torch.float64, torch.float32):
        torch.manual_seed(0)
        network = _network(SyncBatchNorm2d).to(dtype)
        alone = _network(nn.BatchNorm2d).to(dtype)
        alone.load_state_dict(network.state_dict())
        synchronise(network, ranks.world)
        images = torch.randn(2, ranks.world * _IMAGES, 3, 6, 6, dtype=dtype) + 5
        mine = slice(ranks.rank * _IMAGES, (ranks.rank + 1) * _IMAGES)
        ours, theirs = _train(network, images[:, mine]), _train(alone, images)
        for name, p in network.named_parameters():
            assert p.grad is not None
            ours[name] = ranks.sum(p.grad) / ranks.world
        theirs |= {name: p.grad for name, p in alone.named_parameters() if p.grad is not None}
        errors = {}
        for what, whole in theirs.items():
            if what in ("logits", "R1's gradient"):
                whole = whole[:, mine]
            elif what == "images' gradient":  # of the sum over ranks of means
                whole = ranks.world * whole[:, mine]
            errors[what] = float((ours[what] - whole).abs().max())
        everyone = ranks.gather_objects(errors)
        found[str(dtype)] = {what: max(each[what] for each in everyone) for what in errors}
    statistics = [buffer.tolist() for buffer in network.buffers()]
    found["same statistics"] = all(each == statistics for each in ranks.gather_objects(statistics))
    with Wire() as wire:
        network.eval()(images[0, mine])
    return found | {"calls in eval": wire.calls}


def _network(norm: type[nn.Module]) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(3, 5, 3), norm(5), nn.SiLU(), nn.Conv2d(5, 4, 3), norm(4), nn.SiLU()),
        *(nn.Flatten(), nn.Linear(16, 1), nn.Flatten(0)),
    )


def _train(D: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Two passes, R1 on both, one backward; images [2, n, C, H, W]."""
    both = images.clone().requires_grad_()
    logits = torch.stack([D(part) for part in both])
    (gradient,) = torch.autograd.grad(logits.sum(), both, create_graph=True)
    loss = softplus(-logits[0]).mean() + softplus(logits[1]).mean()
    loss = loss + 0.5 * gradient.square().sum() / images.shape[1]
    loss.backward()
    assert both.grad is not None
    found = {"logits": logits.detach(), "R1's gradient": gradient.detach(), "images' gradient": both.grad}
    return found | {name: buffer.to(images.dtype) for name, buffer in D.named_buffers()}
