"""`python -m launch.launcher …`: `accelerate launch …` that passes stop signals on to the training processes.

When one fails it shows no traceback, as the processes report their own errors; it adds only the signal that
ended one.
"""

from __future__ import annotations

import importlib
import logging
import os
import resource
import runpy
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import NoReturn

import psutil

from pipeline import console
from pipeline.garbage import importing
from pipeline.run import stop

_MOST_FILES = 65_536
# Slurm sends them to the whole step; the training processes save and leave.
_TO_THE_STEP = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGTERM)


def main() -> None:
    console.take()
    launcher = _Launcher("USR1", "USR2")
    if not os.environ.get("SHARDGAN_NODE"):
        sys.exit(launcher.after(_launch()))
    for number in _TO_THE_STEP:  # node.sh ignored them, but container runtimes reset that
        signal.signal(number, signal.SIG_IGN)
    sys.exit(_launch())  # srun ends all nodes if one has another status than 0


def launch_from_here(command: Sequence[str], environment: Mapping[str, str], stop_signal: str) -> int:
    """What `python -m launch.launcher …` does, in this process, which has imported torch: another would take
    those seconds again. Replaces os.environ and sys.argv; returns the exit status of `shardgan train`.

    stop_signal: run.stop_signal.
    """
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[1:] = command[command.index("launch.launcher") + 1 :]
    launcher = _Launcher(stop_signal, end=_stopped_early)
    status = _launch()
    if status in (stop.INTERRUPTED, stop.TERMINATED):
        _stopped_early(status)
    return launcher.after(status)


def _stopped_early(status: int) -> NoReturn:
    print("Stopped before training began.", flush=True)
    console.end_process(stop.INTERRUPTED if status == stop.INTERRUPTED else 0)


def allow_connections() -> None:
    """Let this process and the ranks hold as many connections as the system allows, within reason.

    The launcher has two from every rank, the main rank one from every other: the usual soft limit, 1,024 open
    files, is too few for 500 ranks.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_FILES if hard == resource.RLIM_INFINITY else min(_MOST_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _launch() -> int:
    """Run Accelerate's command with the arguments of this process; returns the exit status."""
    allow_connections()
    for name in ("multiprocessing.api", "agent.server.api"):  # the latter: another node's launcher left first
        logging.getLogger(f"torch.distributed.elastic.{name}").disabled = True  # torch resets their level
    with importing():
        importlib.import_module("accelerate")  # and torch
    try:
        runpy.run_module("accelerate.commands.launch", run_name="__main__", alter_sys=True)
    except Exception as error:
        if type(error).__name__ != "ChildFailedError":
            raise
        rank, failure = error.get_first_failure()  # type: ignore[attr-defined]
        if failure.exitcode in (stop.INTERRUPTED, stop.TERMINATED):
            return int(failure.exitcode)
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            print(f"rank {rank} (pid {failure.pid}) was ended by {name}", file=sys.stderr, flush=True)
        return 2 if failure.exitcode == 2 else 1
    return 0


class _Launcher:
    """Passes the first signal on to every training process, including those yet to start.

    They agree, save and leave; torch's launcher would give them 30 seconds and report a failure.
    """

    def __init__(self, *further: str, end: Callable[[int], NoReturn] = os._exit) -> None:
        """further: names of signals beside SIGTERM, SIGINT and SIGHUP. end: what ends this process, with an
        exit status, if there are no training processes yet."""
        os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # torch's launcher then handles none of ours
        self._asked = set[int]()
        self._number: int | None = None
        self._end = end
        # A signal may have waited for it, and its thread then calls these before it is returned.
        stop.StopSignals(*further, on_stop=self._stop, on_kill=_kill_descendants, on_tick=self._pass_on)
        stop.hold()  # pending for the training processes until they handle them
        os.environ[stop.LAUNCHER] = str(os.getpid())

    def after(self, status: int) -> int:
        """Exit status after the training processes, whose own says nothing of a Ctrl-C: they have saved."""
        return stop.INTERRUPTED if status == 0 and self.interrupted else status

    @property
    def interrupted(self) -> bool:
        return self._number == signal.SIGINT

    def _stop(self, number: int) -> None:
        self._number = number

    def _pass_on(self) -> None:
        if self._number is None:
            return
        children = psutil.Process().children()
        if not children and not self._asked and not os.times().children_user:  # none so far
            self._end(stop.INTERRUPTED if self.interrupted else stop.TERMINATED)
        for child in children:
            if child.pid not in self._asked:
                self._asked.add(child.pid)
                with suppress(psutil.NoSuchProcess):
                    child.send_signal(self._number)


def _kill_descendants() -> None:
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            process.kill()


if __name__ == "__main__":
    main()
