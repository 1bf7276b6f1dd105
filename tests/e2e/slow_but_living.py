"""Two watched ranks: one works slowly where the other waits for it, for thrice the timeout; then it hangs."""

from __future__ import annotations

import time
from pathlib import Path

from pipeline.console import end_process
from pipeline.parallel.launched import read_launch
from pipeline.parallel.ranks import Ranks
from pipeline.parallel.watch.watch import BACKSTOP, JobEndedError, Watch

TIMEOUT = 8.0


def meet(rank: int, world: int) -> None:
    """So that however slowly a busy machine starts them is not what is watched."""
    Path(f"here-{rank}").touch()
    while not all(Path(f"here-{other}").exists() for other in range(world)):
        time.sleep(0.02)


def read_slowly(seconds: float) -> None:
    """Always at the same place in the code, as over a slow disk: only the bytes tell that it is at work."""
    end = time.monotonic() + seconds
    with open("/dev/zero", "rb") as file:  # noqa: PTH123
        while time.monotonic() < end:
            file.read(1 << 17)
            time.sleep(0.05)


def main() -> int:
    launch = read_launch()
    meet(launch.rank, launch.world)
    try:
        with Watch(launch, TIMEOUT) as watch:
            ranks = Ranks(launch, BACKSTOP, watch.progress)
            if ranks.main:
                read_slowly(3 * TIMEOUT)
            ranks.barrier()
            print("together", flush=True)
            if ranks.main:
                time.sleep(1000)
            ranks.barrier()
    except JobEndedError:
        return 1
    return 0


if __name__ == "__main__":
    end_process(main())
