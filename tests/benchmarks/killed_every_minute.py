"""How much of its time a run trains that is killed every minute. By hand:

    python tests/benchmarks/killed_every_minute.py 60 600 configs/fashion-mnist.yaml --procs 2 [key=value …]

kills all processes of `shardgan train …` (SIGKILL) every 60 seconds for 600, starts the same command again
each time, and prints where the time went.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil

from pipeline import config
from pipeline.run.checkpoint import find
from pipeline.run.rows import rows


def main(every: float, total: float, arguments: list[str]) -> None:
    settings = [a for a in arguments[1:] if "=" in a and not a.startswith("--")]
    resolved = config.load(arguments[0], settings)
    folder = Path(resolved.run.out) / str(resolved.run.name)
    begun, spent = time.time(), {"start": 0.0, "train": 0.0, "train again": 0.0}
    kills = 0
    while time.time() - begun < total and not (folder / "DONE").exists():
        start, before = time.time(), _saved(folder)
        _attempt(arguments, min(every, total - (start - begun)))
        kills += 1
        reported = [
            row
            for row in rows(folder / "metrics.jsonl")
            if row["time"] > start and "Timing/sec_per_kimg" in row
        ]
        if not reported:
            spent["start"] += time.time() - start
            continue
        sec_per_kimg = statistics.median(row["Timing/sec_per_kimg"] for row in reported)
        first = reported[0]["time"] - start - sec_per_kimg * (reported[0]["Progress/kimg"] - before)
        kept = sec_per_kimg * (_saved(folder) - before)
        spent["start"] += first
        spent["train"] += kept
        spent["train again"] += time.time() - start - first - kept
    wall = time.time() - begun
    shares = ", ".join(f"{name} {seconds / wall:.1%}" for name, seconds in spent.items())
    print(f"{kills} kills in {wall:.0f} s, {_saved(folder):g} kimg: {shares}")


def _attempt(arguments: list[str], seconds: float) -> None:
    with Path("killed_every_minute.log").open("a") as log:
        job = subprocess.Popen(
            [sys.executable, "-m", "launch.cli", "train", *arguments], stdout=log, stderr=log
        )
    try:
        job.wait(seconds)
    except subprocess.TimeoutExpired:
        for process in [*psutil.Process(job.pid).children(recursive=True), psutil.Process(job.pid)]:
            process.kill()
        job.wait()


def _saved(folder: Path) -> float:
    """kimg of the newest checkpoint."""
    return next(iter(find(folder / "checkpoints")), 0) / 1000


if __name__ == "__main__":
    main(float(sys.argv[1]), float(sys.argv[2]), sys.argv[3:])
