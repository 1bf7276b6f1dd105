"""Flags that all ranks combine beside other work: in log2(world) steps, of one small message each."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

import torch
import torch.distributed as dist

_TAG = 1  # of messages between two ranks: collectives have tags of their own
_Answer = SimpleQueue[int | Exception]


class Polls:
    """Asks all ranks at once, in a thread; several questions may be under way, answered in their order.

    By dissemination (Hensgen, Finkel and Manber 1988): in step k each rank sends what it knows to the one 2^k
    further on, so after ceil(log2(world)) steps each knows it of all. The ring by which gloo reduces takes
    2 (world - 1) steps, each of which waits for the one before: at 1,024 ranks that is longer than an update.
    """

    def __init__(self, rank: int, world: int, group: dist.ProcessGroup) -> None:
        """group: of all ranks, on CPUs. A message that waits in it for a slow peer delays no collective."""
        self._rank, self._world, self._group = rank, world, group
        self._asked: SimpleQueue[tuple[int, _Answer] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="polls", daemon=True)
        self._thread.start()

    def ask(self, bits: int) -> Callable[[], int]:
        """bits: of this rank, at most 31. The result waits, and returns those that are set on any rank. It
        raises RuntimeError if a peer is gone."""
        found: _Answer = SimpleQueue()
        self._asked.put((bits, found))

        def answer() -> int:
            value = found.get()
            if isinstance(value, Exception):
                raise value
            return value

        return answer

    def close(self) -> None:
        """Wait until every question is answered: other ranks need this one for theirs."""
        self._asked.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (asked := self._asked.get()) is not None:
            bits, found = asked
            try:
                found.put(self._combine(bits))
            except Exception as error:  # whatever it is, it is raised where the answer is waited for
                found.put(error)

    def _combine(self, bits: int) -> int:
        distance = 1
        while distance < self._world:
            sent, heard = torch.tensor([bits], dtype=torch.int32), torch.empty(1, dtype=torch.int32)
            after, before = (self._rank + distance) % self._world, (self._rank - distance) % self._world
            sending = self._group.send([sent], after, _TAG)
            self._group.recv([heard], before, _TAG).wait()
            sending.wait()
            bits |= int(heard)
            distance *= 2
        return bits
