"""`shardgan train`: check what can be checked, then assemble and run the `accelerate launch` line."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import click

from launch import processes
from launch.launcher import launch_from_here
from launch.processes import STRATEGIES
from pipeline import console
from pipeline.run import stop
from pipeline.wording import counted


@click.command()
@click.argument("config", type=click.Path())
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--strategy", type=click.Choice(STRATEGIES), help="Default: ddp (one process: single).")
@click.option("--procs", type=click.IntRange(min=1), help="Default: one per GPU; on a CPU up to 4.")
@click.option("--mixed_precision", type=click.Choice(["no", "bf16", "fp16"]), default="no", show_default=True)
@click.option("--dry-run", is_flag=True, help="Print the command and the resolved config; start nothing.")
def train(
    config: str,
    settings: tuple[str, ...],
    strategy: str | None,
    procs: int | None,
    mixed_precision: str,
    dry_run: bool,
) -> None:
    """Train what CONFIG describes; the same command again resumes.

    Settings of the form section.key=value override the file. Ctrl-C saves and stops (exit status 130); a
    second one, more than a second later, ends at once.
    """
    if not dry_run:  # before seconds of imports
        click.echo(f"starting {_processes(procs, strategy)} …", err=True)
    import torch

    from pipeline.config import UserError, dump, load
    from pipeline.credentials import redacted
    from pipeline.gan.compatible import check_objective
    from pipeline.parallel.batch import batch_shape
    from pipeline.run.folder import as_begun, check_same, finished, refuse_running, under_a_free_name
    from pipeline.run.images import images_of
    from pipeline.run.reals import checked_index
    from pipeline.run.source import check_init

    procs = procs or processes.default_procs(strategy)
    strategy = strategy or ("single" if procs == 1 else "ddp")
    if strategy == "single" and procs > 1:
        raise UserError(f"--strategy single is one process; for --procs {procs} choose another.")
    processes.check_gpus(procs)
    resolved = load(config, settings)
    check_objective(resolved, batch_shape(resolved.data, procs).images, mixed_precision)
    command, environment = processes.training(strategy, procs, mixed_precision, [config, *settings])
    named = under_a_free_name(resolved)
    folder = Path(named.run.out) / str(named.run.name)
    if dry_run:
        line = processes.launch_line(
            strategy, procs, mixed_precision, ["pipeline.train", *map(redacted, (config, *settings))]
        )
        on_cpu = "" if torch.cuda.device_count() else "ACCELERATE_USE_CPU=1 "
        click.echo(f"{on_cpu}{shlex.join(['accelerate', 'launch', *line])}")
        click.echo(f"\n# the resolved config\n{dump(as_begun(resolved, folder))}", nl=False)
        return
    check_same(named, folder)
    if not finished(folder, named):
        refuse_running(folder)
    processes.check_space(Path(resolved.run.out))
    index = checked_index(resolved, announce=True)
    check_init(resolved, folder, index.num_classes if resolved.data.conditional else 0)
    images_of(resolved.data, torch.device("cpu"))
    for note in processes.notes():
        click.echo(f"note: {note}", err=True)
    if strategy == "single":  # nothing to coordinate: becomes the training process, with its exit status
        console.settle()
        stop.hold()
        os.execve(sys.executable, command, environment)
    line = command[command.index("launch.launcher") + 1 :]
    status = launch_from_here(line, environment, resolved.run.stop_signal)
    sys.exit(0 if status == stop.INTERRUPTED and finished(folder, resolved) else status)


def _processes(procs: int | None, strategy: str | None) -> str:
    """What is known of them before torch counts the GPUs."""
    if procs is None:
        return strategy or "training"
    return f"{counted(procs, 'process')} ({strategy or ('single' if procs == 1 else 'ddp')})"
