"""Time spent in forward passes: how long a rank computes, without its waiting for others.

Ranks train in step, so an update takes as long on a fast rank as on a slow one. A forward pass waits for no
rank unless parameters are gathered for it: under DDP and ZeRO 1 and 2 its time shows which rank is slow.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_Pass = tuple[torch.cuda.Event, torch.cuda.Event]  # where it begins and ends


class ForwardTimer:
    """Adds up the time inside `measured`, on the device's own clock, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._pending: deque[_Pass] = deque()  # of which the device has not said yet how long they took
        self._spare: list[_Pass] = []
        self._seconds = 0.0

    @contextmanager
    def measured(self) -> Iterator[None]:
        if not self._on_gpu:
            start = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - start
            return
        if torch.cuda.is_current_stream_capturing():  # into a graph, in which there is no time
            yield
            return
        # So there are no more events than passes that the device is behind: its queue is bounded.
        while self._pending and self._pending[0][1].query():  # type: ignore[no-untyped-call]
            self._add_first()
        events = self._spare.pop() if self._spare else (_event(), _event())
        events[0].record()
        yield
        events[1].record()
        self._pending.append(events)

    def take(self) -> float:
        """Seconds since the last call. On a GPU, call it once all work is finished."""
        while self._pending:
            self._add_first()
        taken, self._seconds = self._seconds, 0.0
        return taken

    def _add_first(self) -> None:
        start, end = events = self._pending.popleft()
        self._seconds += start.elapsed_time(end) / 1000
        self._spare.append(events)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
