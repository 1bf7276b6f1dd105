"""One rank of `shardgan doctor --live`: what its node sees, and how fast the ranks exchange data.

Without arguments, on each node before there are ranks: what it has room for.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from datetime import timedelta
from typing import Any

import torch

from launch.bench.meter import clocked
from launch.doctor import alone
from launch.fingerprint import Fingerprint, fingerprint, node_name
from launch.processes import free_port
from pipeline.config import UserError, load
from pipeline.console import end_process
from pipeline.cores import cores
from pipeline.data.index import load_index
from pipeline.parallel.environment import flag
from pipeline.parallel.launched import read_launch
from pipeline.parallel.ranks import Ranks

_SMALL, _LARGE = 1, 2**24  # fp32 numbers in an all-reduce
_TIMEOUT_S = 120


def main(images: int, path: str, settings: list[str]) -> None:
    """Meet the others and measure; the main rank prints one line of JSON. images: of one rank and round, with
    which a step is made; 0: none is."""
    ranks = Ranks(read_launch(), timedelta(seconds=_TIMEOUT_S))
    first_here = os.environ.get("LOCAL_RANK", "0") == "0"
    seen = ranks.gather_objects(describe(path, settings, str(ranks.device)) if first_here else None)
    seconds = {count * 4: all_reduce(ranks, count) for count in (_SMALL, _LARGE)}
    steps = ranks.gather_objects(step(ranks, images, path, settings) if images else 0.0)
    failed = [reason for reason in steps if isinstance(reason, str)]
    found = {"world": ranks.world, "nodes": [node for node in seen if node], "seconds": seconds}
    found |= {"images": images, "step": failed[0] if failed else max(steps)}
    if ranks.main:
        print(json.dumps(found), flush=True)
    ranks.leave()


def step(ranks: Ranks, images: int, path: str, settings: list[str]) -> float | str:
    """Seconds of an update that this rank makes for itself while the others do, or why it cannot."""
    ranks.barrier()
    try:
        config = load(path, settings)
        assert config.data.train is not None
        classes = load_index(config.data.train, remote=config.data.remote).num_classes
        return alone.seconds(
            config, images, ranks.precision, classes if config.data.conditional else 0, ranks.device
        )
    except Exception as error:  # memory, or a user's network
        return str(error).splitlines()[0] if str(error) else type(error).__name__


def describe(path: str, settings: list[str], device: str) -> Fingerprint:
    """This node's fingerprint and kind of device, or why its config or data cannot be read."""
    seen = {"device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU"}
    try:
        config = load(path, settings)
        assert config.data.train is not None
        index = load_index(config.data.train, remote=config.data.remote)
    except UserError as error:
        return seen | fingerprint() | {"problem": str(error)}
    return seen | fingerprint(config, index.fingerprint)


def place() -> dict[str, Any]:
    """What this node has room for, and a free port of it."""
    on_cpu = flag(os.environ, "ACCELERATE_USE_CPU")
    return {
        "place": os.environ.get("SLURM_NODEID", "0"),
        "node": node_name(),
        "gpus": 0 if on_cpu else torch.cuda.device_count(),
        "cores": cores(),
        "port": free_port(),
    }


def all_reduce(ranks: Ranks, count: int) -> float:
    """Seconds of an all-reduce of `count` numbers: the median of a few."""
    numbers, times = torch.ones(count, device=ranks.device), list[float]()
    for _ in range(6):
        ranks.barrier()
        with clocked(times):
            ranks.sum(numbers)
    return statistics.median(times[1:])  # the first one connects


if __name__ == "__main__":
    if len(sys.argv) == 1:
        print(json.dumps(place()), flush=True)
        sys.exit()
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
    end_process(0)
