"""`python -m launch.launcher …`: `accelerate launch …` that passes stop signals on to the training processes.

When one fails it shows no traceback, as the processes report their own errors; it adds only the signal that
ended one.
"""

from __future__ import annotations

import logging
import os
import runpy
import signal
import sys
from contextlib import suppress

import psutil

from pipeline import console
from pipeline.run import stop

# Slurm sends them to the whole step; the training processes save and leave.
_TO_THE_STEP = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGTERM)


def main() -> None:
    console.take()
    _Launcher()
    if os.environ.get("SHARDGAN_NODE"):  # node.sh ignored them, but container runtimes reset that
        for number in _TO_THE_STEP:
            signal.signal(number, signal.SIG_IGN)
    for name in ("multiprocessing.api", "agent.server.api"):  # the latter: another node's launcher left first
        logging.getLogger(f"torch.distributed.elastic.{name}").disabled = True  # torch resets their level
    try:
        runpy.run_module("accelerate.commands.launch", run_name="__main__", alter_sys=True)
    except Exception as error:
        if type(error).__name__ != "ChildFailedError":
            raise
        rank, failure = error.get_first_failure()  # type: ignore[attr-defined]
        if failure.exitcode in (stop.INTERRUPTED, stop.TERMINATED):
            sys.exit(failure.exitcode)
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            print(f"rank {rank} (pid {failure.pid}) was ended by {name}", file=sys.stderr, flush=True)
        sys.exit(2 if failure.exitcode == 2 else 1)


class _Launcher:
    """Passes the first signal on to every training process, including those yet to start.

    They agree, save and leave; torch's launcher would give them 30 seconds and report a failure.
    """

    def __init__(self) -> None:
        os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # torch's launcher then handles none of ours
        self._asked = set[int]()
        self._number: int | None = None
        # A signal may have waited for it, and its thread then calls these before it is returned.
        stop.StopSignals("USR1", "USR2", on_stop=self._stop, on_tick=self._pass_on)
        stop.hold()  # pending for the training processes until they handle them
        os.environ[stop.LAUNCHER] = str(os.getpid())

    def _stop(self, number: int) -> None:
        self._number = number

    def _pass_on(self) -> None:
        if self._number is None:
            return
        children = psutil.Process().children()
        if not children and not self._asked and not os.times().children_user:  # none so far
            os._exit(stop.INTERRUPTED if self._number == signal.SIGINT else stop.TERMINATED)
        for child in children:
            if child.pid not in self._asked:
                self._asked.add(child.pid)
                with suppress(psutil.NoSuchProcess):
                    child.send_signal(self._number)


if __name__ == "__main__":
    main()
