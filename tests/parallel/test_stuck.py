"""What the watch asks of the launcher's store when nothing has moved for the whole timeout."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch.distributed as dist

from pipeline.parallel.launched import Launch
from pipeline.parallel.watch.beats import Beat, Process
from pipeline.parallel.watch.watch import Watch

WORLD, TIMEOUT_S = 64, 30.0


class Counted:
    """A store that counts what is read from it."""

    def __init__(self) -> None:
        self._store, self.reads = dist.HashStore(), 0

    def get(self, key: str) -> bytes:
        self.reads += 1
        return self._store.get(key)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


@pytest.fixture
def store() -> Any:
    """All ranks are stuck; the last one is furthest behind."""
    store: Any = Counted()
    for rank in range(WORLD):
        moves = 3 if rank == WORLD - 1 else 4
        Beat(rank, Process(), number=9, moves=moves, still_s=2 * TIMEOUT_S, waiting=True).publish(store)
    return store


def judged(store: Any, rank: int) -> str | None:
    watch = Watch(Launch("ddp", "no", rank, WORLD), TIMEOUT_S)
    watch._still.seconds = 2 * TIMEOUT_S
    verdict = watch._judge_all(store)
    return verdict and verdict.text


def test_one_rank_compares_all_and_the_others_read_one_beat(store):
    assert f"rank {WORLD - 1} " in (judged(store, 0) or "")
    assert store.reads == WORLD
    store.reads = 0
    assert [judged(store, rank) for rank in range(1, WORLD)] == [None] * (WORLD - 1)
    assert store.reads == WORLD - 1


def test_the_next_rank_compares_once_the_first_has_left(store):
    left = Beat(0, Process(), number=10, moves=9)
    dataclasses.replace(left, left=True).publish(store)
    assert f"rank {WORLD - 1} " in (judged(store, 1) or "")
    assert judged(store, 2) is None
