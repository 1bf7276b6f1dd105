"""Run a module of ours under a strategy by `accelerate launch`, and read what its main rank measured."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from launch.train import ACCELERATE_FILES, STRATEGIES
from pipeline.config import UserError

Found = dict[str, Any]


def measure(strategy: str, procs: int, module: str, arguments: Sequence[str]) -> Found:
    """Launch `python -m module OUT *arguments` on `procs` processes; returns the JSON that it wrote to OUT.

    Raises UserError with the end of what the processes said if they failed.
    """
    import torch

    with tempfile.TemporaryDirectory(prefix="shardgan-") as folder, socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
        out = Path(folder) / "out.json"
        command = ["--config_file", str(ACCELERATE_FILES / f"{strategy}.yaml"), "--num_processes", str(procs)]
        if strategy != "single":
            command += ["--main_process_port", str(port)]
        environment = dict(os.environ)
        if not torch.cuda.is_available():
            environment |= {"ACCELERATE_USE_CPU": "1", "DS_ACCELERATOR": "cpu"}
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // procs)))
        probe.close()
        ended = subprocess.run(
            [
                sys.executable,
                "-m",
                "accelerate.commands.launch",
                *command,
                "-m",
                module,
                str(out),
                *arguments,
            ],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if ended.returncode or not out.exists():
            said = "\n".join((ended.stdout + ended.stderr).splitlines()[-30:])
            raise UserError(f"{strategy} on {procs} processes failed ({ended.returncode}):\n{said}")
        found: Found = json.loads(out.read_text())
        return found


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
