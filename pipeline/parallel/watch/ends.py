"""Which rank of this machine ends first: seen at once, not at the next look."""

from __future__ import annotations

import os
import select
import socket
import time
from contextlib import suppress

_MOMENT_S = 0.8  # ranks that run.grace ends look at it twice a second


class Ends:
    """Waits, and meanwhile sees processes of this machine end, in their order.

    Others may soon follow the first, because of what its end does to them: NCCL, by default, ends a process
    whose peer is gone. Only the first is to blame.
    """

    def __init__(self) -> None:
        self._poll = select.poll()
        self._here, self._there = socket.socketpair()
        self._poll.register(self._here, select.POLLIN)
        self._ranks: dict[int, int] = {}  # of open file descriptors
        self.seen: list[int] = []  # ranks, in the order in which they ended

    def wake(self) -> None:
        """End the present `wait`, or the next."""
        self._there.send(b".")

    def watch(self, rank: int, pid: int) -> None:
        """See the end of a process that is alive. Does nothing on systems that cannot (Linux before 5.3)."""
        with suppress(OSError, AttributeError):
            descriptor = os.pidfd_open(pid)
            self._ranks[descriptor] = rank
            self._poll.register(descriptor, select.POLLIN)

    def wait(self, seconds: float) -> None:
        """For so long, or until a process ends, and a moment more: a launcher that ends them all ends this
        one too, which then has nothing to say."""
        before = len(self.seen)
        for descriptor, _ in self._poll.poll(1000 * seconds):
            if descriptor in self._ranks:
                self.seen.append(self._ranks.pop(descriptor))
                self._poll.unregister(descriptor)
                os.close(descriptor)
        if len(self.seen) > before:
            time.sleep(_MOMENT_S)
