"""One update by one process, without others: traced on tensors without memory, or measured on a device."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from launch.bench.meter import clocked
from pipeline.config import Config
from pipeline.data.stream import Batch
from pipeline.parallel.batch import batch_shape
from pipeline.parallel.launched import Precision
from pipeline.parallel.ranks import Ranks
from pipeline.parallel.watch.whereabouts import Progress
from pipeline.players import build
from pipeline.run.stats import Stats
from pipeline.step import train_step

_ENOUGH_S = 5.0  # of measuring


def all_due(config: Config) -> Config:
    """The config whose average update is the first one of this one, as `second_update` makes it."""
    penalty = config.penalty
    penalty = replace(
        penalty,
        r1=replace(penalty.r1, interval=1),
        r2=replace(penalty.r2, interval=1),
        path=replace(penalty.path, interval=1),
    )
    return replace(config, loss=replace(config.loss, D_steps=1), penalty=penalty)


def second_update(
    config: Config, images: int, precision: str, num_classes: int, device: torch.device | None = None
) -> tuple[Callable[[], object], list[Tensor]]:
    """The training step itself, in one process, after a first update; and what is in memory before it.

    It is the first update once more: one turn of D, every lazy penalty due. All players' gradients are there,
    so that the update adds to them.
    """
    device = device or torch.device("cpu")
    data = replace(config.data, batch_size=images, batch_gpu=None)
    config = replace(config, data=data, loss=replace(config.loss, D_steps=1))
    if config.augment.ops:  # all of them, at once
        config = replace(config, augment=replace(config.augment, p=1.0, target=None))
    ranks, stats = _OneProcess(precision, device), Stats(device)
    gan = build(config, ranks, batch_shape(data, 1), [1.0] * num_classes or None)
    dtype = torch.float32 if data.latents else torch.uint8
    pixels = torch.zeros(images, data.channels, data.size, data.size, dtype=dtype)
    batch = Batch(pixels, torch.zeros(images, dtype=torch.int64) if num_classes else None)
    train_step(gan, iter([batch]), 0, stats)
    known = [pixels, *gan.G_ema.averages]
    for engine in (gan.G, gan.D):
        known += [*engine.module.parameters(), *engine.module.buffers()]
        known += [tensor for state in engine.optimizer_state() for tensor in state.values()]
        for p in engine.module.parameters():
            if p.requires_grad:
                p.grad = torch.zeros_like(p)
                known.append(p.grad)
    return lambda: train_step(gan, iter([batch]), 0, stats), known


def seconds(config: Config, images: int, precision: str, num_classes: int, device: torch.device) -> float:
    """Of this update on a device: the median of some."""
    update, _ = second_update(config, images, precision, num_classes, device)
    times: list[float] = []
    while sum(times) < _ENOUGH_S and len(times) < 20:
        with clocked(times):
            update()
    return statistics.median(times)


class _OneProcess(Ranks):
    """A world of one, without the process state that joining would set up."""

    def __init__(self, precision: str, device: torch.device) -> None:
        of_device: Precision = "no" if precision == "no" else "bf16"
        if precision == "fp16" and device.type != "cpu":
            of_device = "fp16"
        self.rank, self.world, self.strategy, self.precision = 0, 1, "single", of_device
        self.compilation = None
        self.device, self.progress, self._control = device, Progress(), None
