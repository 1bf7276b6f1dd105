"""Run a module of ours under a strategy by `accelerate launch`, and read what its main rank wrote."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from launch.processes import ACCELERATE_FILES, STRATEGIES, environment_of, free_port
from pipeline.config import UserError

Found = dict[str, Any]

_GRACE_S = 40.0  # in which a launcher ends its workers: it gives them 30


def measure(strategy: str, procs: int, module: str, arguments: Sequence[str]) -> Found:
    """Launch `python -m module OUT *arguments` on `procs` processes; returns the JSON that it wrote to OUT.

    Raises UserError with the end of what the processes said if they failed.
    """
    import torch

    with tempfile.TemporaryDirectory(prefix="shardgan-") as folder:
        out = Path(folder) / "out.json"
        on_cpu = not torch.cuda.is_available()
        ended = launch(strategy, procs, [module, str(out), *arguments], on_cpu)
        if ended.returncode or not out.exists():
            said = "\n".join((ended.stdout + ended.stderr).splitlines()[-30:])
            raise UserError(f"{strategy} on {procs} processes failed ({ended.returncode}):\n{said}")
        found: Found = json.loads(out.read_text())
        return found


def launch(
    strategy: str,
    world: int,
    module: list[str],
    on_cpu: bool,
    *,
    deepspeed: Path | None = None,
    precision: str = "no",
    environment: dict[str, str] | None = None,
    timeout: float = 1800,
) -> subprocess.CompletedProcess[str]:
    """Run `module ARGUMENTS…` under a strategy, as `accelerate launch` does for a user.

    deepspeed: a JSON config instead of the strategy's own. Raises subprocess.TimeoutExpired, with nothing
    left running.
    """
    options = ["--num_processes", str(world), "--mixed_precision", precision]
    if strategy != "single":
        options += ["--main_process_port", str(free_port())]
    if deepspeed:
        options += ["--deepspeed_config_file", str(deepspeed)]
    command = [sys.executable, "-m", "accelerate.commands.launch", *launcher_file(strategy), *options]
    return run([*command, "-m", *module], environment_of(world, on_cpu) | (environment or {}), timeout)


def launcher_file(strategy: str) -> list[str]:
    return ["--config_file", str(ACCELERATE_FILES / f"{strategy}.yaml")]


def run(command: list[str], environment: dict[str, str], timeout: float) -> subprocess.CompletedProcess[str]:
    """Run a launcher, whose workers end with it, whatever ends it."""
    started = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = started.communicate(timeout=timeout)
    except BaseException:
        os.killpg(started.pid, signal.SIGTERM)  # a launcher passes it on to workers in sessions of their own
        try:
            started.communicate(timeout=_GRACE_S)
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)
            started.wait()
        raise
    return subprocess.CompletedProcess(command, started.returncode, out, err)


def launches(strategies: str, procs: Sequence[int]) -> list[tuple[str, int]]:
    """(strategy, processes) from a comma list of strategies: `single` once, the others in every world.

    Raises UserError naming what is not a strategy.
    """
    names = [name.strip() for name in strategies.split(",") if name.strip()]
    if unknown := [name for name in names if name not in STRATEGIES]:
        raise UserError(f"--strategies {', '.join(unknown)}: there is {', '.join(STRATEGIES)}.")
    return [(name, n) for name in names for n in ([1] if name == "single" else procs)]


def resnet_pair(parameters: float, size: int, images: int, procs: int) -> list[str]:
    """Settings of a residual pair with at least so many parameters in each, `images` per process at once."""
    import torch

    from pipeline.gan.resnet import Discriminator

    width = 8
    with torch.device("meta"):
        while (
            sum(p.numel() for p in Discriminator(size=size, channels=3, width=width).parameters())
            < parameters
        ):
            width = max(width + 8, int(width * 1.1) // 8 * 8)
    return [
        *("data.train=none", f"data.size={size}", f"data.batch_size={images * procs}"),
        *(f"{player}.{key}" for player in "GD" for key in ("kind=resnet", f"width={width}")),
        *("D.norm=none", "loss.kind=hinge", "penalty.l2=1e-6"),
    ]


def show_progress(strategy: str, procs: int) -> None:
    """What is being waited for, on stderr: stdout is for results."""
    click.echo(f"{strategy} on {procs} …", err=True)
