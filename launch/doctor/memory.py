"""Doctor's forecast of a rank's memory: weights and what goes with them by theory, activations by tracing.

Tracing runs the training step on tensors without memory and adds up what is alive at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from launch.bench.meter import LivePeak
from launch.doctor.finding import Finding, Job, ok, warning, would_fail
from launch.doctor.networks import Players
from launch.doctor.place import moments_of
from launch.processes import STRATEGIES
from pipeline.config import Config, UserError
from pipeline.data.stream import Batch
from pipeline.parallel import theory
from pipeline.parallel.batch import batch_shape
from pipeline.parallel.launched import Precision
from pipeline.parallel.ranks import Ranks
from pipeline.parallel.watch.whereabouts import Progress
from pipeline.players import build
from pipeline.run.stats import Stats
from pipeline.step import train_step
from pipeline.wording import counted, in_bytes

WORK_SPACE = 1.6  # measured / traced on a CPU, at most: kernels allocate memory that tracing cannot see
_ZERO_BUCKET = 4 * 2**24  # bytes of gradients that DeepSpeed reduces at once (parallel/zero_settings.py)
_REMEDY = "Lower data.batch_gpu (more rounds of fewer images), or choose a strategy that shards more."


def examine(job: Job, players: Players, num_classes: int) -> Iterator[Finding]:
    """Bytes on one rank at the worst moment, compared with the GPU's."""
    held = states(job, players)
    text = ", ".join(f"{name} {in_bytes(size)}" for name, size in held.items())
    try:
        images = batch_shape(job.config.data, job.world).images
    except UserError:
        return
    try:
        active = activations(job.config, images, job.precision, num_classes)
    except Exception as error:  # a user's network may do anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        yield ok("memory", f"per rank: {text}; activations cannot be traced ({reason})")
        return
    low, high = sum(held.values()) + active, sum(held.values()) + round(WORK_SPACE * active)
    text = (
        f"per rank: {text}, activations of {counted(images, 'image')} {in_bytes(active)}: in all "
        f"{in_bytes(low)} to {in_bytes(high)}, as kernels need"
    )
    if not torch.cuda.is_available():
        yield ok("memory", text)
        return
    there = torch.cuda.get_device_properties(0).total_memory
    text += f"; a GPU here has {in_bytes(there)}"
    if low > there:
        yield would_fail("memory", text, _REMEDY)
    elif high > 0.95 * there:
        yield warning("memory", text, _REMEDY)
    else:
        yield ok("memory", text)


def strategies(job: Job, players: Players) -> Iterator[Finding]:
    """What a rank of as many would hold under each strategy, besides activations."""
    if job.world > 1:
        held = {s: sum(states(replace(job, strategy=s), players).values()) for s in STRATEGIES[1:]}
        text = ", ".join(f"{strategy} {in_bytes(size)}" for strategy, size in held.items())
        yield ok("strategies", f"per rank of {job.world}, besides activations: {text}")


def states(job: Job, players: Players) -> dict[str, int]:
    """Bytes on one rank that do not depend on the number of images, as `shardgan bench memory` measures them;
    with what is gathered or kept in buckets for a while."""
    G, D = (sum(p.numel() for p in player.parameters() if p.requires_grad) for player in players)
    held = theory.held(job.strategy, job.world, G, D)
    moments = [moments_of(optimizer) for optimizer in (job.config.optim.G, job.config.optim.D)]
    held["optimizer"] *= (G * moments[0] + D * moments[1]) / (2 * (G + D))
    if frozen := sum(p.numel() for player in players for p in player.parameters() if not p.requires_grad):
        held["frozen weights"] = 4 * frozen / (job.world if job.strategy in ("fsdp2", "zero3") else 1)
    if job.strategy.startswith("zero"):
        buckets = [min(4 * n, _ZERO_BUCKET) for n in (G, D)]  # stages 1 and 2 free them after backward
        held["buckets"] = sum(buckets) if job.strategy == "zero3" else max(buckets)
    if job.strategy == "zero3":
        held["gradients"] += 4 * max(G, D) / job.world  # the stepping player's, once more
        held["gathered, at most"] = 4 * (G + D)
    return {name: round(size) for name, size in held.items()}


def activations(config: Config, images: int, precision: str, num_classes: int) -> int:
    """The most bytes alive at once in an update of one rank and round, besides what `states` counts."""
    with FakeTensorMode(), patch.object(nn.Module, "_apply", convert_without_memory):
        update, known = second_update(config, images, precision, num_classes)
        with LivePeak(known) as live:
            update()
    peak: int = live.peak
    return peak


def second_update(
    config: Config, images: int, precision: str, num_classes: int
) -> tuple[Callable[[], object], list[Tensor]]:
    """The training step itself, in one process, after a first update; and what is in memory before it.

    All players' gradients are there, so that the update adds to them.
    """
    data = replace(config.data, batch_size=images, batch_gpu=None)
    config = replace(config, data=data, loss=replace(config.loss, D_steps=1))
    if config.augment.ops:  # all of them, at once
        config = replace(config, augment=replace(config.augment, p=1.0, target=None))
    ranks, stats = _OneProcess("no" if precision == "no" else "bf16"), Stats(torch.device("cpu"))
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


class _OneProcess(Ranks):
    """A world of one on the CPU, without the process state that joining would set up."""

    def __init__(self, precision: Precision) -> None:
        self.rank, self.world, self.strategy, self.precision = 0, 1, "single", precision
        self.compilation = None
        self.device, self.progress, self._control = torch.device("cpu"), Progress(), None


def convert_without_memory(module: nn.Module, convert: Callable[[Tensor], Tensor]) -> nn.Module:
    """In place of Module._apply, which changes parameters in place: impossible for those without memory."""
    for child in module.children():
        convert_without_memory(child, convert)
    with torch.no_grad():
        for name, p in module._parameters.items():
            module._parameters[name] = None if p is None else nn.Parameter(convert(p), p.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else convert(buffer)
    return module
