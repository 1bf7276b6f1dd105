"""`shardgan bench penalty`: what an exact L2 penalty costs a training step, under each strategy.

Each strategy is one launch, in which steps with and without L2 alternate; a ratio is of two neighbours, so
that whatever else the machine does slows both. A step's noise is mostly larger than what L2 adds to it, so
the time of L2 is also taken within the step.
"""

from __future__ import annotations

import json

import click
from rich.console import Console
from rich.table import Table

from launch.processes import STRATEGIES
from launch.workers import Found, launches, measure, resnet_pair, show_progress


@click.command("penalty")
@click.option("--strategies", default=",".join(STRATEGIES), show_default=True, metavar="S,…")
@click.option("--procs", type=click.IntRange(1), default=2, show_default=True, help="Except for single.")
@click.option("--params", type=float, default=50e6, show_default=True, help="Of each player, at least.")
@click.option("--steps", type=click.IntRange(1), default=5, show_default=True, help="Pairs of updates.")
@click.option("--size", type=click.Choice(["32", "64", "128", "256"]), default="32", show_default=True)
@click.option("--images", type=click.IntRange(1), default=4, show_default=True, help="Per process.")
def command(strategies: str, procs: int, params: float, steps: int, size: str, images: int) -> None:
    """Step time without and with L2, and the cost of its value beside gathering the weights for it.

    Prints a line of JSON per strategy, then a table. A residual pair on made-up images.
    """
    found = []
    for strategy, world in launches(strategies, [procs]):
        show_progress(strategy, world)
        settings = resnet_pair(params, int(size), images, world)
        found.append(measure(strategy, world, "launch.bench.penalty_worker", [str(steps), *settings]))
        click.echo(json.dumps(found[-1]))
    _report(found, Console())


def _report(found: list[Found], console: Console) -> None:
    sizes = " and ".join(f"{p} {found[0][f'parameters_{p}'] / 1e6:.1f} M" for p in "GD")
    table = Table(title=f"{sizes} parameters, {found[0]['images_per_rank']} images per process")
    headings = ("step without", "with L2", "ratio", "L2 within step", "value", "gathered", "+ autograd")
    table.add_column()
    for heading in headings:
        table.add_column(heading, justify="right")
    for f in found:
        table.add_row(
            f"{f['strategy']} x{f['world']}",
            f"{f['step_without_s']:.3f} s",
            f"{f['step_with_s']:.3f} s",
            f"{f['ratio'] - 1:+.1%}",
            f"{f['share']:.2%}",
            f"{f['value_ms']:.1f} ms",
            f"{f['gathered_value_ms']:.1f} ms",
            f"{f['gathered_autograd_ms']:.1f} ms",
        )
    console.print(table)
    console.print(
        "Both players. L2 within step: time of value and gradient inside the step, over the step's. "
        "Gathered: Σp² of whole weights, under zero3 and fsdp2 gathered for it; + autograd: and its gradient."
    )
