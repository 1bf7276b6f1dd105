"""Watched ranks that say which variables were added while threads may have looked one up."""

from __future__ import annotations

import os
import sys
import threading
from typing import Any

import torch

from pipeline.console import end_process
from pipeline.parallel.launched import read_launch
from pipeline.parallel.ranks import Ranks
from pipeline.parallel.watch.watch import BACKSTOP, Watch
from pipeline.parallel.zero_settings import import_deepspeed

ADDED: list[str] = []


def note(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "os.putenv" and any(thread.name.startswith("watch-") for thread in threading.enumerate()):
        name = os.fsdecode(arguments[0])
        if name not in os.environ:  # of one that is there, glibc changes the value alone
            ADDED.append(name)


def main() -> int:
    launch = read_launch()
    sys.addaudithook(note)
    with Watch(launch, 600.0) as watch:
        ranks = Ranks(launch, BACKSTOP, watch.progress)
        if launch.zero is not None:
            import_deepspeed(torch.device("cpu"))
        os.environ["SHARDGAN_SEEN"] = "yes"  # that the hook works
        ranks.barrier()
    print(f"rank {ranks.rank} added {sorted(ADDED)}", flush=True)
    return 0


if __name__ == "__main__":
    end_process(main())
