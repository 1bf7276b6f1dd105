"""Stops a training again and again, by two signals a few milliseconds apart:

    python stopping.py CONFIG OUT WORLD PAIRS SEED

Every training is a forked child (or one per rank) of this process, which has imported everything, as that
takes longer than all the rest. The first run is unbroken; the others are continued until they are done.
Prints a JSON line per run: its folder and the pairs that it was stopped by. Fails if a stop left a traceback,
a wrong exit status, or no STOPPED file.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch._dynamo  # noqa: F401  # which an optimizer imports
from torch.distributed import TCPStore

import pipeline.loop
import pipeline.run.saving
import pipeline.run.scorer
import pipeline.train
from pipeline.data.stream import TrainingBatches
from pipeline.run.saving import Saver

# Where a training is met, and whether it is kept there until both signals have been sent.
STATES: dict[str, tuple[Any, str, bool]] = {
    "busy": (pipeline.loop, "train_step", False),
    "waiting for data": (TrainingBatches, "__next__", True),
    "copying for a save": (Saver, "begin", True),
    "writing a save": (pipeline.run.saving, "_write", True),
    "scoring": (pipeline.run.scorer, "evaluate_generator", True),
}
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def meet(state: str, occurrence: int, ready: int, go: int) -> None:
    """Say on `ready` when the training is in `state` for the nth time, and wait for `go`."""
    owner, name, kept = STATES[state]
    original: Callable[..., Any] = getattr(owner, name)
    count = 0

    def met(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == occurrence:
            os.write(ready, b"r")
            if kept:
                os.read(go, 1)
        return original(*arguments)

    setattr(owner, name, met)


class Stopper:
    """Starts and stops the trainings of one test."""

    def __init__(self, config: str, out: Path, world: int, seed: int) -> None:
        self.config, self.out, self.world = config, out, world
        self.random = random.Random(seed)
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.starts = 0

    def run(self, name: str, pairs: int) -> list[str]:
        """One run to its end, stopped by at most so many pairs; returns what they were."""
        seen: list[str] = []
        while not (self.out / name / "DONE").exists():
            seen += self.start(name, stop=len(seen) < pairs)
        return seen

    def start(self, name: str, stop: bool) -> list[str]:
        """Start or continue the run, and stop it where chance has it, unless it is done before."""
        self.starts += 1
        log = self.out / f"{name}-{self.starts}.log"
        state = self.random.choice(list(STATES))
        occurrence = 1 if state == "scoring" else self.random.randint(1, 3)
        ready, say_ready = os.pipe()
        wait, go = os.pipe()
        pids: list[int] = []
        for rank in range(self.world):
            pid = os.fork()
            if pid == 0:
                os.setpgid(0, pids[0] if pids else 0)
                os.close(ready)
                os.close(go)
                if stop:
                    meet(state, occurrence, say_ready, wait)
                self.train(name, rank, log)
            pids.append(pid)
            os.setpgid(pid, pids[0])
        os.close(say_ready)
        os.close(wait)
        met = b""
        while len(met) < self.world and (more := os.read(ready, self.world)):
            met += more
        pair = self.signal(pids) if met else ""
        with suppress(BrokenPipeError):  # nobody was kept
            os.write(go, b"g" * self.world)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        os.close(ready)
        os.close(go)
        said, folder = log.read_text(), self.out / name
        good = {0, 130} if self.world == 1 and pair else {0}
        markers = [
            "DONE",
            *(["STOPPED"] if pair else []),
        ]  # done if the pair came during the last update or score
        ended = any((folder / marker).exists() for marker in markers)
        if not set(statuses) <= good or not ended or "Traceback" in said or "error:" in said:
            sys.exit(f"{state} ({occurrence}), {pair or 'no signal'}: exit statuses {statuses}\n{said}")
        return [f"{state}: {pair}"] if pair else []

    def signal(self, pids: list[int]) -> str:
        """Two signals, 0 to 5 ms apart, each to one process or to all."""
        first, second = self.random.choice(SIGNALS), self.random.choice(SIGNALS)
        targets = [self.random.choice([*pids, -pids[0]]) for _ in range(2)]
        apart = self.random.choice((0.0, self.random.uniform(0.0, 5e-4), self.random.uniform(0.0, 5e-3)))
        os.kill(targets[0], first)
        until = time.perf_counter() + apart
        while time.perf_counter() < until:
            pass
        os.kill(targets[1], second)
        kinds = "+".join("all" if target < 0 else "one" for target in targets)
        return f"{first.name}+{second.name} to {kinds}, {1000 * apart:.2f} ms apart"

    def train(self, name: str, rank: int, log: Path) -> None:
        """In a child: train as `accelerate launch` would have this rank do it."""
        file = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.dup2(file, 1)
        os.dup2(file, 2)
        if self.world > 1:
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(self.world),
                "LOCAL_WORLD_SIZE": str(self.world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(self.store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "TORCHELASTIC_RESTART_COUNT": str(self.starts),
            }
        status = pipeline.train.main([self.config, f"run.name={name}", f"run.out={self.out}"])
        sys.stdout.flush()
        os._exit(status)


def main() -> None:
    config, out, world, pairs, seed = sys.argv[1:]
    stopper = Stopper(config, Path(out), int(world), int(seed))
    left, number = int(pairs), 0
    while left > 0 or number == 0:
        seen = stopper.run(f"run-{number}", min(left, 20) if number else 0)
        print(json.dumps({"folder": f"{out}/run-{number}", "pairs": seen}), flush=True)
        left, number = left - len(seen), number + 1


if __name__ == "__main__":
    main()
