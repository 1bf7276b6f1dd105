"""Host time of an update: what the main thread computes while kernels take next to nothing. By hand:

    python tests/benchmarks/host_time.py CHECKOUT [OTHER_CHECKOUT …]

trains tiny networks (width 2, batch 2, one thread) by the code in each checkout, beside the bare maths of its
launch/bench/rivals.py, in short turns that alternate so that a busy machine slows all alike; and prints the
median CPU time of the thread per update, and the least.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

TURNS, UPDATES = 40, 5  # turns of each side, and updates in each
CASES = {"batch norm": (), "no norm": ("G.norm=none", "D.norm=none")}
_TINY = (
    "data.train=none", "data.size=32", "data.batch_size=2", "G.width=2", "D.width=2", "G.z_dim=4",
    "penalty.l2=1e-4",
)  # fmt: skip


def compare(checkouts: list[Path]) -> None:
    """Print microseconds per update for each case. A process per checkout, of which one works at a time."""
    workers = [_worker(checkout) for checkout in checkouts]
    for case in CASES:
        taken: list[list[list[float]]] = [[[], []] for _ in workers]  # of each checkout: ours, bare
        for _ in range(TURNS):
            for worker, sides in zip(workers, taken, strict=True):
                for side, found in enumerate(sides):
                    found.append(_ask(worker, f"{case}|{side}"))
        for checkout, sides in zip(checkouts, taken, strict=True):
            for measure in (statistics.median, min):
                ours, bare = (measure(side[3:]) for side in sides)  # without the first turns, which warm up
                found = f"{measure.__name__} {ours:.0f} µs, bare {bare:.0f} ({ours / bare - 1:+.1%})"
                print(f"{case}: {checkout}: {found}")
    for worker in workers:
        worker.kill()


def _worker(checkout: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(checkout.resolve()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--work"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True, cwd=checkout)


def _ask(worker: subprocess.Popen[str], turn: str) -> float:
    assert worker.stdin is not None
    assert worker.stdout is not None
    print(turn, file=worker.stdin, flush=True)
    return float(worker.stdout.readline())


def work() -> None:
    """Answer each line "case|side" with the microseconds per update of a turn."""
    sides = {f"{case}|{n}": side for case, keys in CASES.items() for n, side in enumerate(_sides(keys))}
    for line in sys.stdin:
        start = time.thread_time()
        for _ in range(UPDATES):
            sides[line.strip()]()
        print((time.thread_time() - start) / UPDATES * 1e6, flush=True)


def _sides(keys: tuple[str, ...]) -> tuple[Callable[[], object], Callable[[], object]]:
    import inspect

    import torch

    from launch.bench.rivals import BareMaths
    from pipeline import config
    from pipeline.data.stream import Batch
    from pipeline.parallel.batch import batch_shape
    from pipeline.players import build
    from pipeline.run.stats import Stats
    from pipeline.step import train_step

    options, cpu = config.load(None, (*_TINY, *keys)), torch.device("cpu")
    ranks: Any = SimpleNamespace(
        rank=0, world=1, main=True, strategy="single", device=cpu, precision="no", low_precision=None,
        compilation=None, progress=SimpleNamespace(moves=0), sum=lambda values: values,
    )  # fmt: skip
    given: list[Any] = [options, ranks, batch_shape(options.data, 1)]
    if "state" in inspect.signature(build).parameters:  # as it was until 0.2
        from pipeline.run.state import State

        given.insert(1, State())
    gan, stats = build(*given), Stats(cpu)
    pixels = torch.zeros(2, options.data.channels, 32, 32, dtype=torch.uint8)
    reals: Iterator[Batch] = iter(lambda: Batch(pixels, None), None)
    bare = BareMaths(options, cpu, False)
    return lambda: train_step(gan, reals, 0, stats), lambda: bare.run(1)


if __name__ == "__main__":
    if sys.argv[1] == "--work":
        work()
    else:
        compare([Path(path) for path in sys.argv[1:]])
