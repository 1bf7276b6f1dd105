"""`python -m launch.launcher …` is `accelerate launch …` without its traceback when a process has failed.

The processes themselves say what went wrong; what they cannot say, the signal that ended one, is added here.
"""

from __future__ import annotations

import logging
import os
import runpy
import signal
import sys

from pipeline import console

# To the whole of a Slurm step: for the training processes, which save and leave.
_TO_THE_STEP = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGTERM)


def main() -> None:
    console.take()
    if os.environ.get("SHARDGAN_NODE"):  # node.sh was deaf to them, but container runtimes forget that
        for number in _TO_THE_STEP:
            signal.signal(number, signal.SIG_IGN)
    for name in ("multiprocessing.api", "agent.server.api"):  # the latter: another node's launcher left first
        logging.getLogger(f"torch.distributed.elastic.{name}").disabled = True  # torch sets the level anew
    try:
        runpy.run_module("accelerate.commands.launch", run_name="__main__", alter_sys=True)
    except Exception as error:
        if type(error).__name__ != "ChildFailedError":
            raise
        rank, failure = error.get_first_failure()  # type: ignore[attr-defined]
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            print(f"rank {rank} (pid {failure.pid}) was ended by {name}", file=sys.stderr, flush=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
