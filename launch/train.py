"""`shardgan train`: check what can be checked, then assemble and run the `accelerate launch` line."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from launch.processes import STRATEGIES, cores, launch_line, notes, process
from pipeline import console
from pipeline.run import stop


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

    Settings of the form section.key=value go over the file. Ctrl-C saves and stops (exit status 130); another
    one, more than a second later, ends at once.
    """
    import torch

    from pipeline import config as configs
    from pipeline.credentials import redacted
    from pipeline.parallel.batch import batch_shape
    from pipeline.run.folder import as_begun, check_same, finished, refuse_running, under_a_free_name
    from pipeline.train import prepare_data

    gpus = torch.cuda.device_count()
    if procs is None:
        procs = 1 if strategy == "single" else gpus or min(cores(), 4)
    strategy = strategy or ("single" if procs == 1 else "ddp")
    if strategy == "single" and procs > 1:
        raise configs.UserError(f"--strategy single is one process; for --procs {procs} choose another.")
    if gpus and procs > gpus:
        raise configs.UserError(f"--procs {procs}, but this machine has {gpus} GPUs.")
    resolved = configs.load(config, settings)
    batch_shape(resolved.data, procs)
    line, environment = process(strategy, procs, mixed_precision, [config, *settings])
    command = launch_line(strategy, procs, mixed_precision, [config, *settings])
    named = under_a_free_name(resolved)
    folder = Path(named.run.out) / str(named.run.name)
    if dry_run:
        click.echo(
            ("" if gpus else "ACCELERATE_USE_CPU=1 ")
            + shlex.join(["accelerate", "launch", *map(redacted, command)])
        )
        click.echo(f"\n# the resolved config\n{configs.dump(as_begun(resolved, folder))}", nl=False)
        return
    check_same(named, folder)
    if not finished(folder, named):
        refuse_running(folder)
    check_space(Path(resolved.run.out))
    prepare_data(resolved, announce=True)
    for note in notes():
        click.echo(f"note: {note}", err=True)
    if strategy == "single":  # nothing to coordinate: take this process's place, signals and exit status
        console.settle()
        stop.hold()
        os.execve(sys.executable, line, environment)
    status = _run(line, environment, resolved.run.stop_signal)
    sys.exit(0 if status == stop.INTERRUPTED and finished(folder, resolved) else status)


def check_space(out: Path, needed_mb: int = 64) -> None:
    """Refuse to start where the first checkpoint could not be written. Raises UserError."""
    import shutil

    from pipeline.config import UserError

    place = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    if not os.access(place, os.W_OK):
        raise UserError(f"The run folder would be in {place}, which cannot be written to. Set run.out.")
    free = shutil.disk_usage(place).free // 2**20
    if free < needed_mb:
        raise UserError(
            f"No space left for the run: {place} has {free} MiB free. Make room, or set run.out to another "
            "disk."
        )


def _run(command: list[str], environment: dict[str, str], stop_signal: str) -> int:
    """Run the launcher, and pass on the first signal; returns the exit status."""
    launcher = start(command, environment)
    signals = stop.StopSignals(
        stop_signal, on_stop=lambda number: ask_to_stop(launcher, number), on_kill=lambda: kill(launcher)
    )
    status = launcher.wait()
    signals.close()
    if signals.received is not None and status < 0:  # it had not got so far as to listen
        status = stop.TERMINATED
    if status in (stop.INTERRUPTED, stop.TERMINATED):
        click.echo("Stopped before training began.")
        return stop.INTERRUPTED if signals.interrupted else 0
    if status == 0 and signals.interrupted:
        return stop.INTERRUPTED
    return status if status in (0, 2) else 1


def start(command: list[str], environment: dict[str, str], **how: Any) -> subprocess.Popen[bytes]:
    """Start a training or its launcher, in a session of its own; it stops when this process ends.

    how: passed on to Popen.
    """
    environment = environment | {stop.LAUNCHER: str(os.getpid())}
    return subprocess.Popen(command, env=environment, start_new_session=True, **how)


def ask_to_stop(started: subprocess.Popen[bytes], number: int = signal.SIGTERM) -> None:
    """number: the signal; a launcher does not listen for SIGCONT, and gets SIGTERM instead."""
    started.send_signal(signal.SIGTERM if number == signal.SIGCONT else number)


def kill(started: subprocess.Popen[bytes]) -> None:
    """With all that it has started."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(started.pid)
        for each in (process, *process.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                each.kill()
