"""The processes that our commands start: command line, environment, a port to meet at, and their end."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline.config import UserError
from pipeline.cores import cores
from pipeline.parallel.compilation import Compilation, check_compilation
from pipeline.parallel.environment import UNMEANT, check_interfaces, flag, left_over, threads
from pipeline.parallel.gpus import gpus, on_gpu
from pipeline.parallel.hybrid import shards_of
from pipeline.run import stop

STRATEGIES = ("single", "ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3")
COMPILED = ("--dynamo_backend", "inductor")
ACCELERATE_FILES = Path(__file__).parent / "accelerate"

_ERROR = re.compile(r"(\[rank\d+\]: )?([\w.]*(Error|Exception)|[\w.]+: error|error): ")
_ECHOES = ("ChildFailedError", "CalledProcessError", "srun: error")  # by launchers, of a process that failed
_GRACE_S = 40.0  # for a launcher to end its workers: it gives them 30


def default_procs(strategy: str | None, batch_size: int) -> int:
    """Processes on this machine if the user names no number: one per GPU, or up to four on a CPU, as far as
    the batch can be divided over so many."""
    if strategy == "single":
        return 1
    most = gpus() or min(cores(), 4)
    return next(procs for procs in range(most, 0, -1) if batch_size % procs == 0)


def check_gpus(procs: int | None) -> None:
    """Raises UserError if a training here would be on GPUs, of which there are fewer than `procs`."""
    if 0 < (found := gpus()) < (procs or 1):
        raise UserError(f"--procs {procs}, but this machine has {found} GPUs.")


def check_strategy(strategy: str, procs: int) -> None:
    """Raises UserError if a strategy cannot have so many processes."""
    if strategy == "single" and procs > 1:
        raise UserError(f"--strategy single is one process; for --procs {procs} choose another.")
    if strategy.startswith("zero") and find_spec("deepspeed") is None:
        raise UserError(
            f"--strategy {strategy} needs DeepSpeed, which is not installed (launch/setup.sh does that). "
            "fsdp2 shards too."
        )
    shards(strategy, procs, procs)


def check_world(strategy: str, procs: int) -> None:
    """Raises UserError if this machine or a strategy cannot have so many processes."""
    check_strategy(strategy, procs)
    check_gpus(procs)


def check_compiling(strategy: str) -> None:
    """Raises UserError for what --compile cannot compile, or not on this machine."""
    check_compilation(Compilation("inductor"), strategy, 1, on_gpu())


def parse_strategies(strategies: str) -> list[str]:
    """Strategies from a comma list. Raises UserError for an unknown one."""
    names = [name.strip() for name in strategies.split(",") if name.strip()]
    if unknown := [name for name in names if name not in STRATEGIES]:
        raise UserError(f"--strategies {', '.join(unknown)}: choose from {', '.join(STRATEGIES)}.")
    return names


def training(
    strategy: str, procs: int, precision: str, arguments: Sequence[str], compiled: bool = False
) -> tuple[list[str], dict[str, str]]:
    """Command line and environment of a training; arguments: its config and settings.

    Raises UserError for what cannot be compiled here.
    """
    environment = environment_of(procs, on_cpu=not on_gpu())
    module = ["pipeline.train", *arguments]
    if compiled:
        check_compiling(strategy)
        # Accelerate's option sets it too, except for DeepSpeed.
        environment["ACCELERATE_DYNAMO_BACKEND"] = "INDUCTOR"
    if strategy == "single":
        environment["ACCELERATE_MIXED_PRECISION"] = precision
        return [sys.executable, "-m", *module], environment
    return [
        sys.executable,
        "-m",
        "launch.launcher",
        *launch_line(strategy, procs, precision, module, *(COMPILED if compiled else ())),
    ], environment


def launch_line(strategy: str, procs: int, precision: str, module: Sequence[str], *options: str) -> list[str]:
    """The arguments of `accelerate launch`. module: its name and arguments."""
    line = [*launcher_file(strategy), "--num_processes", str(procs), "--mixed_precision", precision]
    if strategy != "single":
        line += ["--main_process_port", str(free_port())]
    return [*line, *options, "-m", *module]


def launcher_file(strategy: str) -> list[str]:
    return ["--config_file", str(ACCELERATE_FILES / f"{strategy}.yaml")]


def shards(strategy: str | None, world: int, per_node: int) -> int | None:
    """Under hsdp the number of ranks that share one copy of a player, by its launcher file; else None.

    Raises UserError if the world cannot be divided so.
    """
    if strategy != "hsdp":
        return None
    import yaml

    asked = yaml.safe_load((ACCELERATE_FILES / "hsdp.yaml").read_text()).get("parallelism_config") or {}
    sizes = (int(asked.get(f"parallelism_config_dp_{kind}_size", 1)) for kind in ("shard", "replicate"))
    return shards_of(world, per_node, *sizes)


def as_two_nodes(strategy: str, procs: int) -> list[str]:
    """Options with which hsdp shards over half of one machine's processes, if four or more can be halved: for
    commands that try strategies."""
    halves = strategy == "hsdp" and procs >= 4 and procs % 2 == 0
    return ["--parallelism_config_dp_shard_size", str(procs // 2)] if halves else []


def environment_of(procs: int, on_cpu: bool) -> dict[str, str]:
    """The environment of `procs` processes on this machine: this one's, without other launchers' variables.

    Raises UserError for a variable of the user's with an unusable value.
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
        # Threads that spin while waiting take the cores from the threads they wait for.
        environment.setdefault("OMP_WAIT_POLICY", "passive")
    # Unset, torchrun gives every process one thread, and prints a long warning.
    environment["OMP_NUM_THREADS"] = str(threads(os.environ) or max(1, cores() // procs))
    if procs > 1:
        check_interfaces(environment)
    return environment


def notes() -> list[str]:
    """Settings of this shell that processes started here will not follow."""
    import torch

    found = []
    if names := [name for name in left_over(os.environ) if not name.startswith(UNMEANT)]:
        found.append(f"another launcher's variables are ignored: {', '.join(names)}")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and torch.version.cuda and not torch.cuda.device_count():
        found.append(f"CUDA_VISIBLE_DEVICES='{hidden}' hides all GPUs: training is on CPUs")
    return found


def check_space(out: Path, needed_mb: int = 64) -> None:
    """Raises UserError if there is no room for a first checkpoint in the folder of runs."""
    place = next(p for p in (out.absolute(), *out.absolute().parents) if os.path.exists(p))  # noqa: PTH110
    if not os.access(place, os.W_OK):
        raise UserError(f"The run folder would be in {place}, which is not writable. Set run.out.")
    free = shutil.disk_usage(place).free // 2**20
    if free < needed_mb:
        raise UserError(
            f"No space left for the run: {place} has {free} MiB free. Make room, or set run.out to another "
            "disk."
        )


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


def start(command: list[str], environment: dict[str, str], **how: Any) -> subprocess.Popen[bytes]:
    """Start a training or its launcher in a session of its own; it stops when this process ends.

    how: for Popen.
    """
    environment = environment | {stop.LAUNCHER: str(os.getpid())}
    return subprocess.Popen(command, env=environment, start_new_session=True, **how)


def ask_to_stop(started: subprocess.Popen[bytes], number: int = signal.SIGTERM) -> None:
    """number: the signal; launchers do not handle SIGCONT, and get SIGTERM instead."""
    started.send_signal(signal.SIGTERM if number == signal.SIGCONT else number)


def kill(started: subprocess.Popen[bytes]) -> None:
    """Kill a process and all its descendants."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(started.pid)
        for each in (process, *process.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                each.kill()


def launch(
    strategy: str,
    procs: int,
    module: Sequence[str],
    on_cpu: bool,
    *,
    deepspeed: Path | None = None,
    precision: str = "no",
    environment: dict[str, str] | None = None,
    timeout: float = 1800,
) -> subprocess.CompletedProcess[str]:
    """Run `module ARGUMENTS…` under a strategy, as `accelerate launch` does for a user; hsdp as on two nodes.

    deepspeed: a JSON config instead of the strategy's own. Raises subprocess.TimeoutExpired, with nothing
    left running.
    """
    options = as_two_nodes(strategy, procs)
    options += ["--deepspeed_config_file", str(deepspeed)] if deepspeed else []
    line = launch_line(strategy, procs, precision, module, *options)
    command = [sys.executable, "-m", "accelerate.commands.launch", *line]
    return run(command, environment_of(procs, on_cpu) | (environment or {}), timeout)


def reasons(output: str) -> list[str]:
    """The errors in the output of processes and launchers, else the end of it."""
    lines = [line for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if _ERROR.match(line) and not any(word in line for word in _ECHOES)]
    return list(dict.fromkeys(errors))[:5] or lines[-8:]


def run(command: list[str], environment: dict[str, str], timeout: float) -> subprocess.CompletedProcess[str]:
    """Run a launcher; its workers end with it, however this call ends."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with _signals_raised():
        started = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
        try:
            out, err = started.communicate(timeout=timeout)
        except BaseException:
            os.killpg(started.pid, signal.SIGTERM)  # a launcher passes it on to workers in their own sessions
            try:
                started.communicate(timeout=_GRACE_S)
            except subprocess.TimeoutExpired:
                os.killpg(started.pid, signal.SIGKILL)
                started.wait()
            raise
    return subprocess.CompletedProcess(command, started.returncode, out, err)


@contextmanager
def _signals_raised() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise SystemExit where they would end this process at once: what it started
    would stay."""
    ours = threading.current_thread() is threading.main_thread()
    ending = [n for n in (signal.SIGTERM, signal.SIGHUP) if ours and signal.getsignal(n) == signal.SIG_DFL]
    for number in ending:
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        for number in ending:
            signal.signal(number, signal.SIG_DFL)
