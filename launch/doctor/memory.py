"""What one rank would hold in memory: weights and what goes with them by theory, activations by tracing.

The tracing runs both players' turns on tensors without memory, in the networks that would train, and adds up
what would be alive at once, forwards and backwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from launch.bench.meter import LivePeak
from launch.doctor.finding import Finding, Job, ok, warning, would_fail
from launch.doctor.networks import Players
from launch.doctor.place import moments_of
from pipeline.config import Config, UserError
from pipeline.gan.gradient_penalty import r1
from pipeline.gan.images import to_float
from pipeline.gan.losses import adversarial
from pipeline.parallel import theory
from pipeline.parallel.batch import batch_shape
from pipeline.wording import counted, in_bytes

WORK_SPACE = 1.6  # measured / traced on a CPU, at most: kernels need room of their own, and say so to nobody
Turn = Callable[[], None]

_ZERO_BUCKET = 4 * 2**24  # bytes of gradients that DeepSpeed reduces at once (parallel/zero_settings.py)
_CURE = "Lower data.batch_gpu (more rounds of fewer images), or choose a strategy that shards more."


def examine(job: Job, players: Players, num_classes: int) -> Iterator[Finding]:
    """Bytes on one rank at the worst moment, beside what the GPU has."""
    held = states(job, players)
    text = ", ".join(f"{name} {in_bytes(size)}" for name, size in held.items())
    try:
        images = batch_shape(job.settings.data, job.world).images
    except UserError:
        return
    try:
        active = activations(job.settings, players, images, job.precision, num_classes)
    except Exception as error:  # a network of the user's own may do anything
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
        yield would_fail("memory", text, _CURE)
    elif high > 0.95 * there:
        yield warning("memory", text, _CURE)
    else:
        yield ok("memory", text)


def states(job: Job, players: Players) -> dict[str, int]:
    """Bytes on one rank of all that does not depend on the number of images, as `shardgan bench memory`
    measures it; and of what is gathered or kept in buckets for a while."""
    G, D = (sum(p.numel() for p in player.parameters() if p.requires_grad) for player in players)
    held = theory.held(job.strategy, job.world, G, D)
    moments = [moments_of(optimizer) for optimizer in (job.settings.optim.G, job.settings.optim.D)]
    held["optimizer"] *= (G * moments[0] + D * moments[1]) / (2 * (G + D))
    if job.strategy.startswith("zero"):
        held["buckets"] = sum(min(4 * n, _ZERO_BUCKET) for n in (G, D))
    if job.strategy == "zero3":
        held["gradients"] += 4 * max(G, D) / job.world  # the stepping player's, once more
        held["gathered, at most"] = 4 * (G + D)
    return {name: round(size) for name, size in held.items()}


def activations(settings: Config, players: Players, images: int, precision: str, num_classes: int) -> int:
    """The most bytes alive at once in a turn of either player, besides weights and their gradients.

    players: G and D made of FakeTensors, all of one mode.
    """
    first = next(players[1].parameters())
    assert isinstance(first, FakeTensor)
    with first.fake_mode:
        turns, known = _turns(settings, players, images, precision, num_classes)
        peaks: list[int] = []
        for turn in turns:
            with LivePeak(known) as live:
                turn()
            peaks.append(live.peak)
    return max(peaks)


def _turns(
    settings: Config, players: Players, images: int, precision: str, num_classes: int
) -> tuple[list[Turn], list[Tensor]]:
    """A round of D's and of G's turn, as pipeline/step.py makes them; and the tensors there before."""
    G, D = players
    data, gamma, losses = settings.data, settings.penalty.r1.gamma, adversarial(settings.loss.kind)
    z = torch.zeros(images, settings.G.z_dim)
    c = torch.zeros(images, dtype=torch.int64) if num_classes else None
    reals = torch.zeros(images, data.channels, data.size, data.size, dtype=torch.uint8)
    weights = [*G.parameters(), *D.parameters()]
    for p in weights:
        p.grad = torch.zeros_like(p)

    def compute(player: torch.nn.Module, *inputs: Tensor | None) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision != "no"):  # fp16 is as large
            out: Tensor = player(*inputs)
            return out

    def turn_of_D() -> None:
        G.requires_grad_(False)
        real = to_float(reals).requires_grad_(gamma > 0)
        real_logits = compute(D, real, c)
        loss = losses.d(real_logits, compute(D, compute(G, z, c), c))
        (loss + r1(real, real_logits, gamma) if gamma else loss).backward()  # type: ignore[no-untyped-call]
        G.requires_grad_(True)

    def turn_of_G() -> None:
        D.requires_grad_(False)
        losses.g(compute(D, compute(G, z, c), c), None).backward()  # type: ignore[no-untyped-call]
        D.requires_grad_(True)

    gradients = [p.grad for p in weights if p.grad is not None]
    return [turn_of_D, turn_of_G], [*weights, *gradients, *G.buffers(), *D.buffers(), z, reals]
