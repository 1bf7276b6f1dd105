"""`shardgan doctor`: find what would go wrong before an allocation is spent on it."""

from __future__ import annotations

import sys
from dataclasses import replace

import click

from launch.processes import STRATEGIES
from pipeline.parallel.gpus import on_gpu

_POSITIVE = click.FloatRange(0, min_open=True)


@click.command()
@click.argument("config", type=click.Path(), metavar="CONFIG|FOLDER|ZIP|RUN")
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--nodes", type=click.IntRange(1), default=1, show_default=True)
@click.option("--gpus", type=click.IntRange(1), help="Processes per node. Default: as `shardgan train`.")
@click.option("--strategy", type=click.Choice(STRATEGIES), help="Default: ddp (one process: single).")
@click.option("--mixed_precision", type=click.Choice(["no", "bf16", "fp16"]), default="no", show_default=True)
@click.option("--compile", "compiled", is_flag=True, help="As in `shardgan train`.")
@click.option("--live", is_flag=True, help="Also start the processes: do they meet, and how fast are they?")
@click.option("--tflops", type=_POSITIVE, metavar="T", help="10^12 FLOP/s that a GPU reaches in training.")
@click.option("--bandwidth", type=_POSITIVE, metavar="GB/S", help="What a GPU sends to others of its node.")
@click.option("--network", type=_POSITIVE, metavar="GB/S", help="What a node sends, over all its adapters.")
@click.option("--gpu_memory", type=_POSITIVE, metavar="GIB", help="Of a GPU. Default: this machine's.")
def doctor(
    config: str,
    settings: tuple[str, ...],
    nodes: int,
    gpus: int | None,
    strategy: str | None,
    mixed_precision: str,
    compiled: bool,
    live: bool,
    tflops: float | None,
    bandwidth: float | None,
    network: float | None,
    gpu_memory: float | None,
) -> None:
    """Check everything about a training that can be known before it starts.

    Reads all shards, builds the networks without memory, and trains nothing. With --live it also starts the
    processes, here or on the nodes of the Slurm allocation that it is called in, compares what they see and
    measures how fast they compute and send. From that, or from --tflops, --bandwidth and, of several nodes,
    --network, it forecasts the images per second of each strategy. Exit status 2 if something would fail.
    """
    from rich.console import Console

    from launch.argument import training_of
    from launch.doctor import forecast
    from launch.doctor import live as doctor_live
    from launch.doctor.checks import bar, examine, job_of
    from launch.doctor.finding import Machine, fails, show, would_fail
    from pipeline.config import UserError, load

    table = None
    try:
        training = training_of(config, settings, gpu=on_gpu())
        training.explain()
        config, settings = training.config, training.settings
        machine = Machine(
            flops=tflops and tflops * 1e12,
            bandwidth=bandwidth and bandwidth * 1e9,
            network=network and network * 1e9,
            gpu_memory=round(gpu_memory * 2**30) if gpu_memory else None,
        )
        job = job_of(load(config, settings), nodes, gpus, strategy, mixed_precision, machine, compiled)
        training.prepare()
    except UserError as error:
        found = [would_fail("config", str(error))]
    else:
        with bar() as progress:
            found, costs = examine(job, progress)
        if live:
            seen, measured = doctor_live.examine(job, costs.flops if costs else None, config, settings)
            found, job = [*found, *seen], replace(job, machine=measured)
        if costs is not None:
            expected = forecast.forecasts(job, costs)
            found += forecast.examine(job, expected)
            table = forecast.table(job, expected)
    show(found, Console(), table)
    sys.exit(2 if fails(found) else 0)
