"""Fetches remote shards before they are needed."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Iterable

from pipeline.config import UserError
from pipeline.data.index import Index
from pipeline.data.remote.transfer import StoppedError

_AT_ONCE = 4  # transfers of one process
_TRIES = 5  # per shard and window


class Prefetch:
    """Fetches in the background the shards that are wanted next; does nothing for local shards.

    Every worker of every rank has one, and fetches what no other is fetching. Failures are left to the
    reader, which fetches what is missing itself and raises the error if it cannot.
    """

    def __init__(self, index: Index) -> None:
        self._index = index
        self._todo: deque[int] = deque()
        self._keep: frozenset[str] = frozenset()
        self._failed: Counter[int] = Counter()
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, name="prefetch", daemon=True)
            for _ in range(_AT_ONCE if index.remote else 0)
        ]
        for thread in self._threads:
            thread.start()

    def want(self, shards: Iterable[int]) -> None:
        """Replaces what was wanted before. The most urgent shards come first."""
        shards = list(dict.fromkeys(shards))
        keep = frozenset(self._index.shards[shard].sha256 for shard in shards)
        if keep == self._keep:
            return
        with self._changed:
            self._todo, self._keep, self._failed = deque(shards), keep, Counter()
            self._changed.notify_all()

    def close(self) -> None:
        """Stop all transfers and threads."""
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._todo or self._stop.is_set())
                if self._stop.is_set():
                    return
                shard, keep = self._todo.popleft(), self._keep
            try:
                self._index.fetch_ahead(shard, keep, self._stop)
            except UserError:
                self._later(shard, keep)
            except StoppedError:
                return

    def _later(self, shard: int, keep: frozenset[str]) -> None:
        self._failed[shard] += 1
        self._stop.wait(2.0 ** self._failed[shard])
        with self._changed:
            if self._keep is keep and self._failed[shard] < _TRIES:
                self._todo.append(shard)
