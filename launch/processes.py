"""The processes that our commands start: command line, environment, and a place where they can meet."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

from pipeline.parallel.environment import UNMEANT, check_interfaces, flag, left_over, threads

STRATEGIES = ("single", "ddp", "fsdp2", "zero1", "zero2", "zero3")
ACCELERATE_FILES = Path(__file__).parent / "accelerate"


def process(
    strategy: str, procs: int, precision: str, arguments: list[str]
) -> tuple[list[str], dict[str, str]]:
    """What to run to train (command line and environment), for config and settings as `arguments`."""
    import torch

    environment = environment_of(procs, on_cpu=not torch.cuda.device_count())
    if strategy == "single":
        environment["ACCELERATE_MIXED_PRECISION"] = precision
        return [sys.executable, "-m", "pipeline.train", *arguments], environment
    command = launch_line(strategy, procs, precision, arguments)
    return [sys.executable, "-m", "launch.launcher", *command], environment


def launch_line(strategy: str, procs: int, precision: str, arguments: list[str]) -> list[str]:
    """What follows `accelerate launch`."""
    launcher = ["--config_file", str(ACCELERATE_FILES / f"{strategy}.yaml")]
    launcher += ["--num_processes", str(procs), "--mixed_precision", precision]
    if strategy != "single":
        launcher += ["--main_process_port", str(free_port())]
    return [*launcher, "-m", "pipeline.train", *arguments]


def environment_of(procs: int, on_cpu: bool) -> dict[str, str]:
    """The environment of `procs` processes here: this one's, without what is of other launchers.

    Raises UserError for a variable of the person's that cannot be followed.
    """
    on_cpu = flag(os.environ, "ACCELERATE_USE_CPU") or on_cpu
    cleared = {*left_over(os.environ), "ACCELERATE_USE_CPU"}
    environment = {name: value for name, value in os.environ.items() if name not in cleared}
    environment["PYTHONSAFEPATH"] = "1"  # no file in the current folder hides a module
    checkout = Path(__file__).parents[1]
    if (checkout / "pyproject.toml").exists():  # perhaps not installed, but called from within
        path = [str(checkout), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    if on_cpu:
        environment |= {"ACCELERATE_USE_CPU": "1", "DS_ACCELERATOR": "cpu"}
        # Threads that spin while they wait keep busy cores from the very threads they wait for.
        environment.setdefault("OMP_WAIT_POLICY", "passive")
    # If it is not set, torchrun gives every process one thread, and says so at length.
    environment["OMP_NUM_THREADS"] = str(threads(os.environ) or max(1, cores() // procs))
    if procs > 1:
        check_interfaces(environment)
    return environment


def notes() -> list[str]:
    """What is set in this shell, but does not count for processes that are started here."""
    import torch

    found = []
    if names := [name for name in left_over(os.environ) if not name.startswith(UNMEANT)]:
        found.append(f"another launcher's variables are ignored: {', '.join(names)}")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and torch.version.cuda and not torch.cuda.device_count():
        found.append(f"CUDA_VISIBLE_DEVICES='{hidden}' hides all GPUs: training is on CPUs")
    return found


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_free(port: int) -> bool:
    """Whether a server could listen there, on all addresses of this machine."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port
