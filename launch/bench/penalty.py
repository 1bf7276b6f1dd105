"""`shardgan bench penalty`: what an exact L2 penalty costs a training step, under each strategy.

Each strategy is one launch, in which steps with and without L2 alternate; ratios are of neighbours, so that
other load slows both. As a step's noise is mostly larger than what L2 adds, L2 is also timed within the step.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from launch.bench import pair, table
from launch.bench.meter import clocked
from launch.bench.pair import Found
from pipeline.config import WeightPenalty
from pipeline.data.stream import Batch
from pipeline.gan.schedules import Now, Rates
from pipeline.parallel.engine import Engine
from pipeline.parallel.ranks import Ranks
from pipeline.parallel.weight_penalty import LocalPenalty
from pipeline.parallel.zero_settings import import_deepspeed
from pipeline.players import Gan
from pipeline.run.stats import Stats
from pipeline.step import train_step

_WARM_UP = 1  # pairs of steps that do not count


@click.command("penalty")
@click.option("--steps", type=click.IntRange(1), default=5, show_default=True, help="Pairs of updates.")
@pair.options(images=4)
def command(steps: int, **options: Any) -> None:
    """Step time without and with L2, and the cost of its value beside gathering the weights for it.

    Prints a line of JSON per strategy, then a table. A residual pair on made-up images.
    """
    found = pair.measure("launch.bench.penalty", str(steps), **options)
    table.show(
        f"{pair.title(found)}, {found[0]['images_per_rank']} images per process",
        ("step without", "with L2", "ratio", "L2 within step", "value", "gathered", "+ autograd"),
        map(_row, found),
        "Both players. L2 within step: time of value and gradient inside the step, over the step's. "
        "Gathered: Σp² of whole weights, gathered under zero3, fsdp2, hsdp; + autograd: with its gradient.",
    )


def _row(found: Found) -> list[str]:
    return [
        f"{found['strategy']} x{found['world']}",
        *(f"{found[key]:.3f} s" for key in ("step_without_s", "step_with_s")),
        f"{found['ratio'] - 1:+.1%}",
        f"{found['share']:.2%}",
        *(f"{found[key]:.1f} ms" for key in ("value_ms", "gathered_value_ms", "gathered_autograd_ms")),
    ]


# In a rank


@dataclass(frozen=True)
class Clocked(LocalPenalty):
    """A penalty that records the time it takes within a step."""

    seconds: list[float] = field(default_factory=list)

    def sums(self, squares: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        with clocked(self.seconds):  # again, as the step may have summed these squares with the gradient's
            return super().sums()

    def add_gradient(self, gradients: list[torch.Tensor], now: Rates) -> None:
        with clocked(self.seconds):
            super().add_gradient(gradients, now)


def main(out: Path, steps: int, settings: list[str]) -> None:
    """Measure under the launcher's strategy; the main rank writes OUT."""
    ranks, gan, reals, found = pair.begin(settings)
    found |= {"images_per_rank": gan.G.batch.local, "device": ranks.device.type}
    found |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    found |= _steps(gan, ranks, reals, steps)
    found |= _ways_to_the_value(gan, ranks, repeats=max(3, steps))
    pair.end(ranks, out, found)


def _steps(gan: Gan, ranks: Ranks, reals: Iterator[Batch], steps: int) -> dict[str, float]:
    """Steps without and with L2, alternating, and the time that L2 takes within those with it."""
    seconds: dict[bool, list[float]] = {False: [], True: []}
    own, stats = [], Stats(ranks.device)
    for number in range(steps + _WARM_UP):
        for on in (False, True) if number % 2 else (True, False):
            penalties = _set_penalties(gan, λ := 1e-6 if on else 0.0)
            with_λ = replace(gan, at=partial(_with_L2, gan.at, λ))
            ranks.barrier()
            with clocked(seconds[on]):
                train_step(with_λ, reals, number * gan.batch_size, stats)
            own += [sum(sum(p.seconds) for p in penalties) / seconds[True][-1]] if on else []
    without, with_L2 = seconds[False][_WARM_UP:], seconds[True][_WARM_UP:]
    return {
        "step_without_s": statistics.median(without),
        "step_with_s": statistics.median(with_L2),
        "ratio": statistics.median(on / off for off, on in zip(without, with_L2, strict=True)),
        "share": statistics.median(own[_WARM_UP:]),
    }


def _set_penalties(gan: Gan, λ: float) -> list[Clocked]:
    """Give both players L2, or none with λ = 0."""
    made = []
    for engine in (gan.G, gan.D):
        engine.penalty = penalty = Clocked.over(engine.fragments, WeightPenalty(l2=λ))
        made.append(penalty)
    return made


def _with_L2(at: Callable[[int], Now], λ: float, cur_nimg: int) -> Now:
    now = at(cur_nimg)
    return replace(now, G=replace(now.G, l2=λ), D=replace(now.D, l2=λ))


def _ways_to_the_value(gan: Gan, ranks: Ranks, repeats: int) -> dict[str, float]:
    """Milliseconds for both ‖W‖² over fragments, and on gathered weights without and with autograd."""
    ways: dict[str, Callable[[Engine], object]] = {
        "value_ms": _over_fragments,
        "gathered_value_ms": partial(_gathered, ranks, gradient=False),
        "gathered_autograd_ms": partial(_gathered, ranks, gradient=True),
    }
    _set_penalties(gan, λ=1e-6)
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, way in ways.items():
            ranks.barrier()
            with clocked(taken[name]):
                for engine in (gan.G, gan.D):
                    way(engine)
    return {name: 1000 * statistics.median(times[1:]) for name, times in taken.items()}


def _over_fragments(engine: Engine) -> torch.Tensor:
    """As it is charted: each rank's sum over its own elements, and one all-reduce of a scalar."""
    return engine.total(engine.penalty.sums()["l2_penalty"])


def _gathered(ranks: Ranks, engine: Engine, gradient: bool) -> None:
    """λΣp² as autograd has it, on whole parameters gathered by the strategy's own means."""
    penalised = engine.player.penalised
    parameters = [p for name, p in engine.module.named_parameters() if name in penalised]
    gathering: AbstractContextManager[Any] = nullcontext()
    if ranks.strategy == "zero3":
        gathering = import_deepspeed(ranks.device).zero.GatheredParameters(parameters)
    with gathering, torch.set_grad_enabled(gradient):
        whole = [_full(p) for p in parameters]
        value = torch.stack([1e-6 * p.pow(2).sum() for p in whole]).sum()
        if gradient:
            torch.autograd.grad(value, whole)
    engine.end_turn()


def _full(p: torch.Tensor) -> torch.Tensor:
    whole: torch.Tensor = p.full_tensor() if hasattr(p, "full_tensor") else p
    return whole.detach().requires_grad_(torch.is_grad_enabled())


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
