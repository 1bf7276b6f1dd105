"""Worker processes: deaf to the group's signals, gone with their rank, and never in the way of an exit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import MakeShards

from pipeline.data.index import load_index

RANK = """
import signal, sys, time
from multiprocessing import active_children
import torch
from pipeline.data.index import load_index
from pipeline.data.plan import training_plan
from pipeline.data.stream import training_batches

if __name__ == "__main__":
    if sys.argv[2] == "forkserver":
        torch.cuda.is_initialized = lambda: True
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)
    index = load_index(sys.argv[1])
    plan = training_plan(index.sizes, 0, 4, 0.0, None, 0)
    stream = training_batches(index, plan, start=0, batch_size=4, rank=0, world=1, size=4, channels=1,
                              conditional=False, workers=2)
    next(stream)
    print(*(child.pid for child in active_children()), flush=True)
    if sys.argv[3] == "train":
        for line in sys.stdin:
            for _ in range(20):
                next(stream)
            print("trained", flush=True)
    if sys.argv[3] == "fail":
        raise SystemExit(3)
"""


def start(folder: Path, root: Path, method: str, then: str) -> tuple[subprocess.Popen[str], list[int]]:
    script = folder / "rank.py"
    script.write_text(RANK)
    rank = subprocess.Popen(
        [sys.executable, str(script), str(root), method, then],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert rank.stdout is not None
    return rank, [int(pid) for pid in rank.stdout.readline().split()]


def end(rank: subprocess.Popen[str], workers: list[int]) -> None:
    rank.kill()
    for pid in filter(_alive, workers):
        os.kill(pid, signal.SIGKILL)
    rank.communicate(timeout=10)


def gone(pids: list[int], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(_alive(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_signals_to_the_group_then_a_killed_rank(
    make_shards: MakeShards, tmp_path: Path, method: str
) -> None:
    root = make_shards([50, 50])
    load_index(str(root))
    rank, workers = start(tmp_path, root, method, "train")
    assert rank.stdin is not None and rank.stdout is not None and len(workers) == 2
    try:
        for number in (signal.SIGUSR1, signal.SIGINT, signal.SIGTERM):
            os.killpg(rank.pid, number)
            rank.stdin.write("go on\n")
            rank.stdin.flush()
            assert rank.stdout.readline() == "trained\n"
        assert all(map(_alive, workers))
        rank.kill()
        assert gone(workers, 30), "workers die with their rank"
    finally:
        end(rank, workers)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("then", "status"), [("exit", 0), ("fail", 3)])
def test_exit_without_closing(make_shards: MakeShards, tmp_path: Path, then: str, status: int) -> None:
    rank, workers = start(tmp_path, make_shards([50, 50]), "fork", then)
    try:
        assert rank.wait(timeout=120) == status
        assert gone(workers, 30)
    finally:
        end(rank, workers)
