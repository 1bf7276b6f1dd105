"""Where the time goes from Enter to the first update. By hand, on a quiet machine:

    python tests/benchmarks/first_minute.py configs/fashion-mnist.yaml --procs 2 [key=value …]

starts `shardgan train …` on a run of two updates, and prints when what happened: seconds since the start, and
the processor seconds that all its processes had used. Import times: python -X importtime -c "import …".
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

FILES = {
    "reals.png": "grid of real images",
    "fakes000000.png": "first sample grid",
    "metrics.jsonl": "first score",
}


def main(arguments: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        small = [
            f"run.out={folder}",
            "run.name=first",
            "run.total_kimg=0.128",
            "run.tick_kimg=0.001",
            "track.wandb=false",
        ]
        start = time.monotonic()
        command = ["shardgan", "train", *arguments, *small]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        timeline = Timeline(process.pid, start)
        watching = threading.Thread(target=timeline.watch, args=(Path(folder) / "first",), daemon=True)
        watching.start()
        for line in process.stdout or ():
            timeline.event(line.rstrip())
        process.wait()
        timeline.event(f"exit status {process.returncode}")


class Timeline:
    """Prints events with the time since the start."""

    def __init__(self, pid: int, start: float) -> None:
        self._root, self._start = psutil.Process(pid), start
        self._known: dict[int, float] = {}  # PID → processor seconds

    def watch(self, run: Path) -> None:
        """Notice new processes and files."""
        seen = set[str]()
        with suppress(psutil.NoSuchProcess):
            while True:
                self._count()
                for path in (*run.glob("samples/*"), *run.glob("metrics.jsonl")):
                    if path.name in FILES and path.name not in seen:
                        seen.add(path.name)
                        self.event(f"[{FILES[path.name]}]")
                time.sleep(0.02)

    def event(self, text: str) -> None:
        print(
            f"{time.monotonic() - self._start:7.2f} s {sum(self._known.values()):7.2f} cpu  {text[:90]}",
            flush=True,
        )

    def _count(self) -> None:
        for process in (self._root, *self._root.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                used = process.cpu_times()
                if process.pid not in self._known:
                    self.event(f"[process {' '.join(process.cmdline()[1:4])[:60]}]")
                self._known[process.pid] = used.user + used.system


if __name__ == "__main__":
    main(sys.argv[1:])
