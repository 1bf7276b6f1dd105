"""`shardgan train`: check what can be checked, then assemble and run the `accelerate launch` line."""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import click

from launch.processes import STRATEGIES, cores, launch_line, notes, process


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

    Settings of the form section.key=value go over the file. Ctrl-C saves and stops; a second one stops at
    once.
    """
    import torch

    from pipeline import config as configs
    from pipeline.credentials import redacted
    from pipeline.parallel.batch import batch_shape
    from pipeline.run.folder import check_same
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
    if dry_run:
        click.echo(
            ("" if gpus else "ACCELERATE_USE_CPU=1 ")
            + shlex.join(["accelerate", "launch", *map(redacted, command)])
        )
        click.echo(f"\n# the resolved config\n{configs.dump(resolved)}", nl=False)
        return
    folder = Path(resolved.run.out) / str(resolved.run.name)
    if resolved.run.resume:
        check_same(resolved, folder)
    check_space(Path(resolved.run.out))
    prepare_data(resolved, announce=True)
    for note in notes():
        click.echo(f"note: {note}", err=True)
    if strategy == "single":  # nothing to coordinate: take this process's place, signals and exit status
        sys.stdout.flush()
        os.execve(sys.executable, line, environment)
    sys.exit(_run(line, environment, resolved.run.stop_signal))


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
    """Run the launcher; a signal here asks the workers, who agree, save and leave in good order."""
    launcher = subprocess.Popen(
        command,
        env=environment,
        start_new_session=True,
        preexec_fn=die_with_parent,  # noqa: PLW1509
    )
    asked = False

    def forward(number: int, _frame: object) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            os.killpg(launcher.pid, signal.SIGKILL)
        elif not asked:
            asked = True
            ask_to_stop(launcher)

    for number in (signal.SIGINT, signal.SIGTERM, signal.Signals[f"SIG{stop_signal}"]):
        signal.signal(number, forward)
    return 0 if launcher.wait() == 0 else 1


def ask_to_stop(launcher: subprocess.Popen[bytes]) -> None:
    """SIGTERM to one worker is enough: all agree. The launcher itself would report a failure."""
    import psutil

    workers = psutil.Process(launcher.pid).children()
    if workers:
        workers[0].terminate()
    else:
        launcher.terminate()


def die_with_parent() -> None:
    """No orphan trains on when this process is killed without a chance to pass it on."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
