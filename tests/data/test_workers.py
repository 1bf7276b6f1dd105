"""Worker processes: deaf to the group's signals, gone with their rank, and never in the way of an exit."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_shards import MakeShards
from torch.utils.data import IterableDataset

from pipeline import folders
from pipeline.config import UserError
from pipeline.data import workers
from pipeline.data.index import load_index
from pipeline.data.workers import Loader, WorkerError

RANK = """
import signal, sys, time
from multiprocessing import active_children, forkserver
import torch
from pipeline.config import Data
from pipeline.data.index import load_index
from pipeline.data.plan import Split
from pipeline.data.stream import training_batches

if __name__ == "__main__":
    if sys.argv[2] != "fork":
        torch.cuda.is_initialized = lambda: True
    if sys.argv[2] == "theirs":
        forkserver.ensure_running()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)
    index = load_index(sys.argv[1])
    plan = Split(index.sizes, 0, 4).training()
    stream = training_batches(index, plan, Data(size=4, channels=1, batch_size=4, workers=2))
    for _ in range(2):  # one of each worker: both have begun, and blocked signals
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
def test_ctrl_c_where_a_fork_server_runs_already(make_shards: MakeShards, tmp_path: Path) -> None:
    """A notebook's own, which Python 3.14 starts by default, blocks no signals in its children."""
    root = make_shards([50, 50])
    load_index(str(root))
    rank, workers = start(tmp_path, root, "theirs", "train")
    assert rank.stdin is not None and rank.stdout is not None and len(workers) == 2
    try:
        os.killpg(rank.pid, signal.SIGINT)
        rank.stdin.write("go on\n")
        rank.stdin.flush()
        assert rank.stdout.readline() == "trained\n" and all(map(_alive, workers))
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


# Items that do not come


class Items(IterableDataset[Any]):
    """What a function gives, without end."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield self._make()


def tensor() -> tuple[torch.Tensor, str]:
    return torch.arange(64, dtype=torch.uint8), "beside"


def told(loader: Loader) -> str:
    """What is said instead of an item, of which a few may still be under way."""
    with pytest.raises(WorkerError) as failure:
        for _ in range(20):
            next(loader)
    assert failure.value.status == 1 and not children()
    return str(failure.value)


_before: set[int | None] = set()  # children that earlier tests have left to the collection of garbage


@pytest.fixture(autouse=True)
def _children_of_others() -> None:
    _before.clear()
    _before.update(child.pid for child in active_children())


def children() -> list[int]:
    return [child.pid for child in active_children() if child.pid is not None and child.pid not in _before]


def test_a_worker_that_is_killed_is_not_waited_for() -> None:
    loader = Loader(Items(tensor), 2)
    next(loader)
    killed = children()[0]
    os.kill(killed, signal.SIGKILL)
    assert f"(pid {killed}) was ended by SIGKILL: out of memory?" in told(loader)


def test_a_worker_that_is_killed_disturbs_nothing_before_its_item_is_due() -> None:
    """torch's handler would raise wherever the training happens to be."""
    before = signal.getsignal(signal.SIGCHLD)
    loader = Loader(Items(tensor), 1)
    assert signal.getsignal(signal.SIGCHLD) == before
    loader.close()


def test_a_worker_that_ends_by_itself() -> None:
    assert "ended by itself, with status 7" in told(Loader(Items(lambda: os._exit(7)), 1))


def test_an_item_that_cannot_be_handed_over() -> None:
    assert "could not hand over a batch: " in (text := told(Loader(Items(lambda: (lambda: 0,)), 1)))
    assert "local object" in text and "\n" not in text and "data.workers" not in text


class Unshared:
    def __reduce__(self) -> str:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left (28)")


def test_shared_memory_that_is_full_is_named() -> None:
    said = told(Loader(Items(lambda: (Unshared(),)), 1))
    assert "No space left (28). Is /dev/shm full?" in said and "data.workers=0" in said


def test_a_worker_that_makes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_TIMEOUT_S", 0.2)
    monkeypatch.setattr(workers, "_LOOK_S", 0.1)
    assert "have not made a batch within 0.2 s" in told(Loader(Items(signal.pause), 1))


def test_an_error_in_a_worker_is_its_own() -> None:
    def fail() -> None:
        raise RuntimeError("the paint ran out")

    loader = Loader(Items(fail), 1)
    with pytest.raises(RuntimeError, match="the paint ran out"):
        next(loader)
    loader.close()


# Machines that lack something


@pytest.fixture
def long_folder(tmp_path: Path) -> Path:
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    return folder


def test_a_folder_for_temporary_files_with_a_long_name(
    make_shards: MakeShards, tmp_path: Path, long_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(long_folder))
    rank, pids = start(tmp_path, make_shards([50, 50]), "forkserver", "exit")
    try:
        assert len(pids) == 2 and rank.wait(timeout=120) == 0
    finally:
        end(rank, pids)


def test_where_sockets_can_be_made(
    tmp_path: Path, long_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        monkeypatch.setattr(tempfile, "tempdir", short)
        assert folders.socket_folder() == short and not list(Path(short).iterdir())
        monkeypatch.setattr(tempfile, "tempdir", str(long_folder))
        monkeypatch.setattr(folders, "_FOR_SOCKETS", ("/nowhere", short))
        assert folders.socket_folder() == short
    with pytest.raises(UserError, match="Set TMPDIR to a folder"):
        folders.socket_folder()


def test_little_shared_memory_is_passed_by(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def handed_over(free: int) -> tuple[torch.Tensor, str]:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(free, 0, free))  # type: ignore[attr-defined]
        loader = Loader(Items(tensor), 1, item_bytes=64)
        (image, beside) = next(loader)
        loader.close()
        return image, beside

    for free, shared in ((1 << 20, True), (100, False)):
        image, beside = handed_over(free)
        assert torch.equal(image, tensor()[0]) and beside == "beside"
        assert image.is_shared() is shared


def test_no_semaphores(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("_multiprocessing.SemLock", refuse)
    with pytest.raises(UserError, match=r"Permission denied.*data\.workers=0"):
        Loader(Items(tensor), 1)
