"""`shardgan doctor`: find what would go wrong before an allocation is spent on it."""

from __future__ import annotations

import sys

import click

from launch import processes
from launch.processes import STRATEGIES


@click.command()
@click.argument("config", type=click.Path(), metavar="CONFIG|FOLDER|ZIP|RUN")
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--nodes", type=click.IntRange(1), default=1, show_default=True)
@click.option("--gpus", type=click.IntRange(1), help="Processes per node. Default: as `shardgan train`.")
@click.option("--strategy", type=click.Choice(STRATEGIES), help="Default: ddp (one process: single).")
@click.option("--mixed_precision", type=click.Choice(["no", "bf16", "fp16"]), default="no", show_default=True)
@click.option("--compile", "compiled", is_flag=True, help="As of `shardgan train`.")
@click.option("--live", is_flag=True, help="Also start the processes: do they meet, and see the same?")
def doctor(
    config: str,
    settings: tuple[str, ...],
    nodes: int,
    gpus: int | None,
    strategy: str | None,
    mixed_precision: str,
    compiled: bool,
    live: bool,
) -> None:
    """Check everything about a training that can be known before it starts.

    Reads all shards, builds the networks without memory, and trains nothing. With --live it also starts the
    processes, here or on the nodes of the Slurm allocation that it is called in, compares what they see and
    measures how fast they talk. Exit status 2 if something would fail.
    """
    from rich.console import Console

    from launch.argument import training_of
    from launch.doctor import live as doctor_live
    from launch.doctor.checks import bar, examine, job_of
    from launch.doctor.finding import fails, show, would_fail
    from pipeline.config import UserError, load

    try:
        training = training_of(config, settings, gpu=processes.on_gpu())
        training.explain()
        config, settings = training.config, training.settings
        job = job_of(load(config, settings), nodes, gpus, strategy, mixed_precision, compiled)
        training.prepare()
    except UserError as error:
        found = [would_fail("config", str(error))]
    else:
        with bar() as progress:
            found = examine(job, progress)
        if live:
            found += doctor_live.examine(job, config, settings)
    show(found, Console())
    sys.exit(2 if fails(found) else 0)
