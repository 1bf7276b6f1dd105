"""Where the time goes from Enter to the first update. By hand, on a quiet machine:

    python tests/benchmarks/first_minute.py configs/fashion-mnist.yaml --procs 2 [key=value …]

starts `shardgan train …` and prints when what happened, until the first update: seconds since the start, and
the processor seconds that all its processes had used. `score.metrics=[]` leaves out the first score. What
imports take: python -X importtime -c "import pipeline.train".
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil

_FILES = {
    "reals.png": "[grid of real images]",
    "fakes000000.png": "[first sample grid]",
    "metrics.jsonl": "[first row of metrics.jsonl]",
}


def main(arguments: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        ours = [f"run.out={folder}", "run.name=first", "run.tick_kimg=0.001", "track.wandb=false"]
        start = time.monotonic()
        process = subprocess.Popen(
            ["shardgan", "train", *arguments, *ours],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        timeline = Timeline(process.pid, start)
        folders = (Path(folder) / "first",)
        threading.Thread(target=timeline.watch, args=folders, daemon=True).start()
        asked = False
        for line in process.stdout or ():
            timeline.event(line.rstrip())
            if line.startswith("kimg") and float(line.split()[1]) > 0 and not asked:
                asked = True
                timeline.event("[first update]")
                process.terminate()
        timeline.event(f"exit status {process.wait()}")


class Timeline:
    """Prints events with the time since the start."""

    def __init__(self, pid: int, start: float) -> None:
        self._root, self._start = psutil.Process(pid), start
        self._used: dict[int, float] = {}  # PID → processor seconds

    def watch(self, run: Path) -> None:
        """Notice new processes and files."""
        seen = set[str]()
        with suppress(psutil.NoSuchProcess):
            while True:
                self._count()
                there = {path.name for path in (*run.glob("*.jsonl"), *run.glob("samples/*"))}
                for name in sorted((there - seen) & set(_FILES)):
                    self.event(_FILES[name])
                seen |= there
                time.sleep(0.02)

    def event(self, text: str) -> None:
        used = sum(self._used.values())
        print(f"{time.monotonic() - self._start:7.2f} s {used:7.2f} cpu  {text[:90]}", flush=True)

    def _count(self) -> None:
        for process in (self._root, *self._root.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                if process.pid not in self._used:
                    self.event(f"[process {' '.join(process.cmdline()[1:4])[:60]}]")
                self._used[process.pid] = times.user + times.system


if __name__ == "__main__":
    main(sys.argv[1:])
