"""`shardgan bench save`: what a checkpoint costs training, written beside it and waited for."""

from __future__ import annotations

import json

import click
from rich.console import Console
from rich.table import Table

from launch.workers import launches, measure, resnet_pair, show_progress


@click.command("save")
@click.option("--strategies", default="single,ddp,zero2", show_default=True, metavar="S,…")
@click.option("--procs", type=click.IntRange(1), default=2, show_default=True, help="Except for single.")
@click.option("--params", type=float, default=50e6, show_default=True, help="Of each player, at least.")
@click.option("--times", type=click.IntRange(1), default=3, show_default=True)
@click.option("--images", type=click.IntRange(1), default=2, show_default=True, help="Per process.")
def command(strategies: str, procs: int, params: float, times: int, images: int) -> None:
    """How long a save keeps training waiting, as it is done and if one waited for the disk.

    Prints a line of JSON per strategy, then a table of medians. A residual pair on made-up images; files go
    to the folder for temporary files.
    """
    table = Table(title=f"A checkpoint of two players of {params / 1e6:g} M parameters")
    for heading in ("", "size", "copied", "waited for", "update alone", "while it is written"):
        table.add_column(heading, justify="right" if heading else "left")
    for strategy, world in launches(strategies, [procs]):
        show_progress(strategy, world)
        settings = [str(times), *resnet_pair(params, 32, images, world)]
        found = measure(strategy, world, "launch.bench.save_worker", settings)
        click.echo(json.dumps(found))
        seconds = (found[key] for key in ("copied", "waited_for", "alone", "beside"))
        size = f"{found['bytes'] / 2**20:,.0f} MiB"
        table.add_row(f"{strategy} x{world}", size, *(f"{s:.2f} s" for s in seconds))
    console = Console()
    console.print(table)
    console.print("Copied: all that training waits for. Waited for: with writing, fsync and SHA-256 as well.")
