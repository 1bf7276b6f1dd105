"""Doctor's forecast of a rank's memory: weights and what goes with them by theory, activations by tracing.

Tracing runs the training step on tensors without memory and adds up what is alive at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from launch.bench.meter import LivePeak
from launch.doctor.alone import second_update
from launch.doctor.finding import Finding, Job, ok, warning, would_fail
from launch.doctor.networks import Players
from pipeline.config import Config, UserError
from pipeline.gan.frozen import sizes
from pipeline.parallel import theory
from pipeline.parallel.batch import batch_shape
from pipeline.parallel.gpus import on_gpu
from pipeline.parallel.theory import moments_of
from pipeline.wording import counted, in_bytes

WORK_SPACE = 1.6  # measured / traced on a CPU, at most: kernels allocate memory that tracing cannot see
_FULL = 0.95  # of a GPU's memory, at most
_ZERO_BUCKET = 4 * 2**24  # bytes of gradients that DeepSpeed reduces at once (parallel/zero_settings.py)
_REMEDY = "Lower data.batch_gpu (more rounds of fewer images), or choose a strategy that shards more."
_OF_STATES = "Choose a strategy that shards more, use more GPUs, or make the networks narrower."
_AT_MOST = "gathered, at most"


def traced(job: Job, num_classes: int) -> int | str:
    """Bytes of a rank's activations, or why they cannot be traced."""
    try:
        images = batch_shape(job.config.data, job.world).images
        return activations(job.config, images, job.precision, num_classes)
    except Exception as error:  # a user's network may do anything
        return str(error).splitlines()[0] if str(error) else type(error).__name__


def of_gpu(job: Job) -> int | None:
    """Bytes of a GPU's memory: as said, else of one here that would be trained on."""
    if job.machine.gpu_memory:
        return job.machine.gpu_memory
    there = not job.machine.remote and on_gpu()
    return torch.cuda.get_device_properties(0).total_memory if there else None


def examine(job: Job, players: Players, active: int | str) -> Iterator[Finding]:
    """Bytes on one rank at the worst moment, compared with the GPU's. active: from `traced`."""
    try:
        held = states(job, players)
        images = batch_shape(job.config.data, job.world).images
    except UserError:
        return
    text = f"per rank: {', '.join(f'{name} {in_bytes(size)}' for name, size in held.items())}"
    if isinstance(active, str):
        low = high = at_least(held)
        text += f": in all at least {in_bytes(low)}; activations cannot be traced ({active})"
    else:
        low, high = in_all(held, active)
        text += (
            f", activations of {counted(images, 'image')} {in_bytes(active)}: in all "
            f"{in_bytes(low)} to {in_bytes(high)}, as kernels need"
        )
    there = of_gpu(job)
    if there is None:
        yield ok("memory", text)
        return
    text += f"; a GPU {'' if job.machine.gpu_memory else 'here '}has {in_bytes(there)}"
    remedy = _OF_STATES if isinstance(active, str) else _REMEDY
    if low > there:
        yield would_fail("memory", text, remedy)
    elif not fits(high, there):
        yield warning("memory", text, remedy)
    else:
        yield ok("memory", text)


def at_least(held: dict[str, int]) -> int:
    """Bytes on a rank whatever the images need. held: from `states`."""
    return sum(size for name, size in held.items() if name != _AT_MOST)


def in_all(held: dict[str, int], active: int) -> tuple[int, int]:
    """Bytes on a rank, from and to, as kernels need. held: from `states`."""
    return sum(held.values()) + active, sum(held.values()) + round(WORK_SPACE * active)


def fits(high: int, there: int) -> bool:
    return high <= _FULL * there


def states(job: Job, players: Players) -> dict[str, int]:
    """Bytes on one rank that do not depend on the number of images, as `shardgan bench memory` measures them;
    with what is gathered or kept in buckets for a while."""
    (G, frozen_G), (D, frozen_D) = map(sizes, players)
    moments = moments_of(job.config.optim.G), moments_of(job.config.optim.D)
    held = theory.held(job.strategy, job.world, G, D, job.shards, moments)
    if frozen := frozen_G + frozen_D:
        held["frozen weights"] = theory.frozen(job.strategy, job.world, frozen, job.shards)
    if job.strategy.startswith("zero"):
        buckets = [min(4 * n, _ZERO_BUCKET) for n in (G, D)]  # stages 1 and 2 free them after backward
        held["buckets"] = sum(buckets) if job.strategy == "zero3" else max(buckets)
    if job.strategy == "zero3":
        held["gradients"] += 4 * max(G, D) / job.world  # the stepping player's, once more
        held[_AT_MOST] = 4 * (G + D + frozen)
    return {name: round(size) for name, size in held.items()}


def activations(config: Config, images: int, precision: str, num_classes: int) -> int:
    """The most bytes alive at once in an update of one rank and round, besides what `states` counts."""
    with FakeTensorMode(), patch.object(nn.Module, "_apply", convert_without_memory):
        update, known = second_update(config, images, precision, num_classes)
        with LivePeak(known) as live:
            update()
    peak: int = live.peak
    return peak


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
