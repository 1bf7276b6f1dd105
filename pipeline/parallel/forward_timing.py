"""Time spent in forward passes: how long a rank computes, without its waiting for others.

Ranks train in step, so an update takes as long on a fast rank as on a slow one. A forward pass waits for no
rank unless parameters are gathered for it: under DDP and ZeRO 1 and 2 its time shows which rank is slow.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class ForwardTimer:
    """Adds up the time inside `measured`, on the device's own clock, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] | None = (
            [] if device.type == "cuda" else None
        )
        self._seconds = 0.0

    @contextmanager
    def measured(self) -> Iterator[None]:
        if self._events is None:
            start = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - start
            return
        events = _event(), _event()
        events[0].record()
        yield
        events[1].record()
        self._events.append(events)

    def take(self) -> float:
        """Seconds since the last call. On a GPU, call it once all work is finished."""
        for start, end in self._events or ():
            self._seconds += start.elapsed_time(end) / 1000
        if self._events is not None:
            self._events.clear()
        taken, self._seconds = self._seconds, 0.0
        return taken


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
