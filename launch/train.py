"""`shardgan train`: check what can be checked, then assemble and run the `accelerate launch` line."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from launch import processes
from launch.launcher import launch_from_here
from launch.processes import STRATEGIES
from pipeline import console
from pipeline.garbage import importing
from pipeline.parallel.gpus import gpus, on_gpu
from pipeline.run import stop
from pipeline.wording import counted

if TYPE_CHECKING:
    from launch.training import Training
    from pipeline.config import Config


@click.command()
@click.argument("config", type=click.Path(), metavar="CONFIG|FOLDER|ZIP|RUN")
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--strategy", type=click.Choice(STRATEGIES), help="Default: ddp (one process: single).")
@click.option(
    "--procs", type=click.IntRange(min=1), help="Processes. Default: one per GPU; without GPUs up to 4."
)
@click.option("--mixed_precision", type=click.Choice(["no", "bf16", "fp16"]), default="no", show_default=True)
@click.option("--compile", "compiled", is_flag=True, help="Compile the networks with torch.compile.")
@click.option("--dry-run", is_flag=True, help="Print the command and the resolved config; start nothing.")
def train(
    config: str,
    settings: tuple[str, ...],
    strategy: str | None,
    procs: int | None,
    mixed_precision: str,
    compiled: bool,
    dry_run: bool,
) -> None:
    """Train what a config describes, or on your own images; the same command again resumes.

    A FOLDER of images (its sub-folders are the classes) or a ZIP of one is prepared first, into shards beside
    it; a folder of shards is used as it is. Size, channels, classes and a preset for this machine follow from
    the images and are fixed in the config.yaml of the run, which has the folder's name. A RUN, runs/NAME, is
    resumed as its config.yaml says.

    Settings of the form section.key=value override the file. Ctrl-C saves and stops (exit status 130); a
    second one, more than a second later, ends at once.
    """
    if not dry_run:  # before seconds of imports
        click.echo(f"starting {_processes(procs, strategy)} …")
    with importing():
        from launch.argument import training_of
        from pipeline.config import dump, load
        from pipeline.gan.compatible import check_objective
        from pipeline.parallel.batch import batch_shape
        from pipeline.run.folder import as_begun, check_same, finished, refuse_running, under_a_free_name

    training = training_of(config, settings, gpu=on_gpu())
    training.explain()
    config, settings = training.config, training.settings
    resolved = load(config, settings)
    procs = procs or _default_procs(strategy, resolved.data.batch_size)
    strategy = strategy or ("single" if procs == 1 else "ddp")
    processes.check_world(strategy, procs)
    check_objective(resolved, batch_shape(resolved.data, procs).images, mixed_precision)
    given = [config, *settings]
    command, environment = processes.training(strategy, procs, mixed_precision, given, compiled)
    named = under_a_free_name(resolved)
    folder = Path(named.run.out) / str(named.run.name)
    if dry_run:
        _show_line(strategy, procs, mixed_precision, compiled, given)
        click.echo(f"\n# the resolved config\n{dump(as_begun(resolved, folder))}", nl=False)
        return
    if resolved.run.resume:  # else a run that has just taken this name leaves the next one to this one
        check_same(named, folder)
        if not finished(folder, named):
            refuse_running(folder)
    processes.check_space(Path(resolved.run.out))
    _check_data(training, resolved, folder)
    for note in processes.notes():
        click.echo(f"note: {note}", err=True)
    if strategy == "single":  # nothing to coordinate: becomes the training process, with its exit status
        console.settle()
        stop.hold()
        os.execve(sys.executable, command, environment)
    status = launch_from_here(command, environment, resolved.run.stop_signal)
    stop.ignore()
    sys.exit(0 if status == stop.INTERRUPTED and finished(folder, resolved) else status)


def _default_procs(strategy: str | None, batch_size: int) -> int:
    procs = processes.default_procs(strategy, batch_size)
    if strategy != "single" and procs < (found := gpus()):
        why = f"data.batch_size={batch_size} cannot be divided equally over more"
        click.echo(f"note: only {procs} of {found} GPUs are used: {why}", err=True)
    return procs


def _show_line(strategy: str, procs: int, precision: str, compiled: bool, arguments: Sequence[str]) -> None:
    """Print what a person would write to start the same."""
    from pipeline.credentials import redacted

    module = ["pipeline.train", *map(redacted, arguments)]
    options = processes.COMPILED if compiled else ()
    line = processes.launch_line(strategy, procs, precision, module, *options)
    variables = "" if on_gpu() else "ACCELERATE_USE_CPU=1 "
    if compiled and strategy.startswith("zero"):  # for which Accelerate drops its own option
        variables += "ACCELERATE_DYNAMO_BACKEND=inductor "
    click.echo(f"{variables}{shlex.join(['accelerate', 'launch', *line])}")


def _check_data(training: Training, config: Config, folder: Path) -> None:
    """Prepare the images of a training, if need be, and check what depends on them. Raises UserError."""
    import torch

    from pipeline.gan.networks import check_networks
    from pipeline.run.features import check_features
    from pipeline.run.images import images_of
    from pipeline.run.reals import checked_index
    from pipeline.run.source import check_init
    from pipeline.run.tensorboard import check_tensorboard

    check_tensorboard(config)
    check_features(config.score)
    if training.preparation:  # a size that the networks do not have is not worth preparing
        check_networks(config, num_classes=0)
    training.prepare()
    index = checked_index(config, announce=True)
    check_init(config, folder, index.num_classes if config.data.conditional else 0)
    images_of(config.data, torch.device("cpu"))


def _processes(procs: int | None, strategy: str | None) -> str:
    """What is known of them before torch counts the GPUs."""
    if procs is None:
        return strategy or "training"
    return f"{counted(procs, 'process')} ({strategy or ('single' if procs == 1 else 'ddp')})"
