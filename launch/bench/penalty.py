"""`shardgan bench penalty`: what an exact L2 penalty costs a training step, under each strategy.

Each strategy is one launch, in which steps with and without L2 alternate; ratios are of neighbours, so that
other load slows both. As a step's noise is mostly larger than what L2 adds, L2 is also timed within the step.
"""

from __future__ import annotations

from typing import Any

import click

from launch.bench import pair, table
from launch.bench.pair import Found


@click.command("penalty")
@click.option("--steps", type=click.IntRange(1), default=5, show_default=True, help="Pairs of updates.")
@pair.options(images=4)
def command(steps: int, **options: Any) -> None:
    """Step time without and with L2, and the cost of its value beside gathering the weights for it.

    Prints a line of JSON per strategy, then a table. A residual pair on made-up images.
    """
    found = pair.measure("launch.bench.penalty_worker", str(steps), **options)
    table.show(
        f"{pair.title(found)}, {found[0]['images_per_rank']} images per process",
        ("step without", "with L2", "ratio", "L2 within step", "value", "gathered", "+ autograd"),
        map(_row, found),
        "Both players. L2 within step: time of value and gradient inside the step, over the step's. "
        "Gathered: Σp² of whole weights, gathered under zero3 and fsdp2; + autograd: with its gradient.",
    )


def _row(found: Found) -> list[str]:
    return [
        f"{found['strategy']} x{found['world']}",
        *(f"{found[key]:.3f} s" for key in ("step_without_s", "step_with_s")),
        f"{found['ratio'] - 1:+.1%}",
        f"{found['share']:.2%}",
        *(f"{found[key]:.1f} ms" for key in ("value_ms", "gathered_value_ms", "gathered_autograd_ms")),
    ]
