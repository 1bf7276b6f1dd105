"""How much time training takes: reports, saves and evaluations apart."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Seconds of training since the last tick, and how many of them it waited for data."""

    def __init__(self) -> None:
        self.start(0)

    def start(self, cur_nimg: int) -> None:
        """Count from here."""
        self._since, self._cur_nimg, self.waited = time.perf_counter(), cur_nimg, 0.0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._since

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """The time inside does not count."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - start

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The time inside counts as waiting for data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def charts(self, seconds: list[float], waited: list[float], cur_nimg: int) -> dict[str, float]:
        """Speed since the last tick, from every rank's seconds; {} if nothing was trained on."""
        if not (images := cur_nimg - self._cur_nimg):
            return {}
        return {
            "Timing/sec_per_kimg": max(seconds) / images * 1000,
            "Timing/img_per_sec": images / max(seconds),
            "Timing/data_wait_frac": sum(waited) / sum(seconds),
        }
