"""The first rank that ends is named, and not one that its end took with it."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch.distributed as dist

from pipeline.parallel.environment import settle_nccl
from pipeline.parallel.launched import Launch
from pipeline.parallel.watch import watch
from pipeline.parallel.watch.beats import Beat, Process
from pipeline.parallel.watch.watch import Watch

WORLD = 4
PATIENCE_S = 60.0  # for a message that comes at once


@pytest.fixture
def others() -> Iterator[dict[int, subprocess.Popen[bytes]]]:
    """The processes of ranks 1, 2 and 3."""
    started = {rank: subprocess.Popen(["sleep", "600"]) for rank in range(1, WORLD)}
    yield started
    for process in started.values():
        process.kill()
        process.wait()


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> queue.Queue[str]:
    """What rank 0, which is this process, says; it would end with that."""
    texts: queue.Queue[str] = queue.Queue()
    monkeypatch.setattr(Watch, "_print", lambda _, text: texts.put(text))
    monkeypatch.setattr(watch, "_abandon", lambda: None)
    monkeypatch.setattr(Launch, "settle", lambda *_: None)  # the variables of the process that runs the tests
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(WORLD))
    return texts


def test_machines_may_share_a_name() -> None:
    """All containers of a machine have its kernel; on another machine a pid is somebody else's."""
    assert Process().is_near() and not Process().is_gone()
    child = subprocess.Popen(["true"])
    child.wait()
    assert Process(pid=child.pid).is_gone()
    assert not Process(kernel="another", pid=child.pid).is_gone()


def test_a_survivor_that_aborts_is_not_the_one_who_is_named(
    monkeypatch: pytest.MonkeyPatch,
    others: dict[int, subprocess.Popen[bytes]],
    said: queue.Queue[str],
) -> None:
    """Rank 0's neighbour in the ring aborts after rank 2 was killed, as NCCL has it do by default, and takes
    with it the only look at rank 2 that there was. Rank 3 leaves in good order before."""
    store = dist.HashStore()
    monkeypatch.setattr(watch, "launcher_store", lambda _: store)
    beats = {rank: Beat(rank, Process(pid=other.pid), at="in an update") for rank, other in others.items()}
    with Watch(Launch("ddp", "no", 0, WORLD), timeout_s=600.0) as watched:
        number = 0
        while watched._unwatched:  # they beat until rank 0 knows their processes
            number += 1
            for beat in beats.values():
                replace(beat, number=number).publish(store)
            watched._over.wait(0.05)
        replace(beats[3], number=number, left=True).publish(store)
        others[3].kill()
        others[3].wait()
        others[2].kill()
        first = said.get(timeout=PATIENCE_S)
        os.kill(others[1].pid, signal.SIGABRT)
        others[1].wait()
    assert first.startswith(f"rank 2 ({beats[2].process.host}, pid {others[2].pid}) is gone: killed")
    assert first.endswith("in an update.")
    assert said.empty()


def test_ends_are_seen_in_their_order_until_woken(others: dict[int, subprocess.Popen[bytes]]) -> None:
    ends = watch.Ends()
    for rank, other in others.items():
        ends.watch(rank, other.pid)
    order = [3, 1]
    for rank in order:
        others[rank].kill()
        ends.wait(PATIENCE_S)
    assert ends.seen == order
    ends.wake()
    ends.wait(PATIENCE_S)
    assert ends.seen == order


@pytest.mark.parametrize(
    ("given", "timeout_s", "expected"),
    [
        ({}, 86400.0, ("2", "86400")),
        ({"TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"}, 120.0, ("2", "480")),  # as torch's launcher sets it
        ({"TORCH_NCCL_ASYNC_ERROR_HANDLING": "3"}, 120.0, ("3", "480")),
        ({"TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "30"}, 86400.0, ("2", "30")),
    ],
)
def test_nccl_leaves_failures_to_the_watch_unless_the_user_says_otherwise(
    given: dict[str, str], timeout_s: float, expected: tuple[str, str]
) -> None:
    environment = dict(given)
    settle_nccl(environment, timeout_s)
    names = ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC")
    assert tuple(environment[name] for name in names) == expected
