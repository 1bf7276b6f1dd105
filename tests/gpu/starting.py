"""What parts of the GPU suite start. If it fails, all that it said is in the log of the part."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from machine import GPUS

SECONDS = "SHARDGAN_GPU_SECONDS"  # a variable of the environment: when suite.py ends this part
_START = time.monotonic()  # of this part, which has a process of its own
_MOST_S = float(os.environ.get(SECONDS, "120")) - 10  # for all its launches: it must still say which one hung


class Failed(Exception):
    """Why it failed, in a few lines."""


def launch(
    strategy: str, world: int, module: Sequence[str], precision: str = "no", deepspeed: Path | None = None
) -> str:
    """What `module ARGUMENTS…` printed under a strategy. Raises Failed."""
    from launch import processes

    how = {"on_cpu": not GPUS, "precision": precision, "deepspeed": deepspeed}
    return _checked(
        f"{strategy} x{world}",
        lambda seconds: processes.launch(strategy, world, module, timeout=seconds, **how),
    )


def run(what: str, command: list[str]) -> str:
    """What a command printed. Raises Failed."""
    from launch import processes

    return _checked(what, lambda seconds: processes.run(command, dict(os.environ), seconds))


def _checked(what: str, start: Callable[[float], subprocess.CompletedProcess[str]]) -> str:
    """start: given the seconds that are left."""
    from launch import processes

    left = max(1.0, _START + _MOST_S - time.monotonic())
    try:
        ended = start(left)
    except subprocess.TimeoutExpired as late:
        said, how = _text(late.output) + _text(late.stderr), f"was out of time after {left:.0f} s"
    else:
        if not ended.returncode:
            return ended.stdout
        said, how = ended.stdout + ended.stderr, f"failed ({ended.returncode})"
    print(f"{what} {how}:\n{said}", file=sys.stderr, flush=True)
    raise Failed(f"{what} {how}: {'; '.join(processes.reasons(said))}")


def _text(said: bytes | str | None) -> str:
    """Bytes, even of a process that is read as text: subprocess decodes only what is complete."""
    return said.decode(errors="replace") if isinstance(said, bytes) else said or ""
