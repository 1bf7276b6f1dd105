"""Ends the job, on all ranks and with one message, when a rank is gone, frozen or stuck.

Every rank has two threads. One looks at its own main thread every second. The other publishes what it saw in
the launcher's store and reads its neighbour's: each rank reports the next one if that is gone or silent, and
any of its own machine as soon as that ends. If the first rank has not moved for the whole timeout it compares
all: if none moves, the one furthest behind is to blame. The first to find something writes a verdict into the
store and prints it; all read it and exit. The traffic is a few short messages per rank and second, and the
launcher's store outlives every rank.

Time is counted in short steps, so that a job that was suspended as a whole has not aged.
"""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import Literal

import torch.distributed as dist
from torch._C._distributed_c10d import Store

from pipeline.config import UserError
from pipeline.console import end_process
from pipeline.errors import CommonError
from pipeline.parallel.launched import Launch, launcher_store
from pipeline.parallel.watch.beats import Beat, Process, Verdict, read_beat, read_verdict
from pipeline.parallel.watch.ends import Ends
from pipeline.parallel.watch.whereabouts import Progress, Whereabouts, look
from pipeline.wording import in_kimg

BACKSTOP = timedelta(hours=24)  # of collectives: a verdict ends them, not slow work on another rank
_PATIENCE_S = 10.0  # for the main rank to finish its reports before the job ends
_TRAFFIC = (
    64 * 1024
)  # bytes that a working rank reads or writes between two looks, and a waiting one does not
_GONE = "is gone: killed (out of memory?) or crashed"
_LOST_S = 10.0  # of silence after which a rank is gone, if connections broke
_BROKEN = re.compile(r"gloo|NCCL|Connection (closed|reset)|Broken pipe|TCPStore|recvValue", re.IGNORECASE)


class JobEndedError(Exception):
    """A rank failed, and the reason is printed: just exit."""


class _Duration:
    """How long something has lasted, in steps of a limited size."""

    def __init__(self, longest_step_s: float) -> None:
        self._longest, self._last, self.seconds = longest_step_s, time.monotonic(), 0.0

    def advance(self, restart: bool = False) -> float:
        now = time.monotonic()
        self.seconds = 0.0 if restart else self.seconds + min(now - self._last, self._longest)
        self._last = now
        return self.seconds


class Watch:
    """Watches this rank and its neighbour inside its `with` block; does nothing in a world of one."""

    def __init__(self, launch: Launch, timeout_s: float) -> None:
        self.progress = Progress()
        self.last_words: Callable[[], str] = lambda: ""  # where the run can be continued from
        self.record: Callable[[str], None] = lambda text: None  # keeps why the job ends
        self._launch, self._rank, self._world, self._timeout_s = launch, launch.rank, launch.world, timeout_s
        self._interval_s = min(1.0, timeout_s / 20)
        self._spread = _number("LOCAL_WORLD_SIZE", launch.world) < launch.world
        self._still, self._unheard, self._silent = (_Duration(timeout_s / 4) for _ in range(3))
        self._heard = False
        self._mine = Beat(launch.rank, Process())
        self._neighbour: Beat | None = None
        self._awake = False  # the neighbour has moved: what it published is not from an earlier attempt
        self._suspicious = self._leaving = False
        self._failure: Verdict | None = None
        self._ends, self._over = Ends(), threading.Event()
        first, here = launch.rank - _number("LOCAL_RANK", 0), _number("LOCAL_WORLD_SIZE", 1)
        others = (rank for rank in range(first, first + here) if rank != launch.rank)
        self._unwatched: dict[int, int | None] = dict.fromkeys(others)  # ranks here → first number of theirs
        self._threads = [
            threading.Thread(target=target, name=f"watch-{target.__name__}", daemon=True)
            for target in (self._look_inside, self._look_around)
        ]

    def __enter__(self) -> Watch:
        if self._world > 1:
            self._launch.settle(os.environ, BACKSTOP.total_seconds())
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        """Publish how this rank ends. Raises JobEndedError once the reason is printed."""
        if self._world == 1:
            return False
        if error is None or isinstance(error, CommonError):
            self._say_goodbye(None)
        elif isinstance(error, UserError | KeyboardInterrupt):  # this rank prints it itself
            if isinstance(error, UserError):
                self.record(f"rank {self._rank}: {error}")
            self._say_goodbye(Verdict(self._rank, str(error), printed=True))
            self._linger()
        else:
            if not (_is_broken_connection(error) and self._is_explained()):
                traceback.print_exception(error)
                reason = "".join(traceback.format_exception_only(error)).strip()
                kimg = self.progress.cur_nimg / 1000
                failed = f"{self._mine.name} failed at kimg {in_kimg(kimg)}"
                self._say_goodbye(self._verdict(f"{failed}: {reason}"))
            self._linger()
            raise JobEndedError from None
        return False

    def _say_goodbye(self, failure: Verdict | None) -> None:
        """Publish that this rank exits, and why."""
        self._failure, self._leaving = failure, True
        self._ends.wake()
        self._threads[1].join(_PATIENCE_S)

    def _is_explained(self) -> bool:
        """Connections broke: wait until a verdict says which rank is gone. False if there is none."""
        self._suspicious = True
        deadline = time.monotonic() + min(2.5 * _LOST_S, self._timeout_s / 2)
        while self._threads[1].is_alive() and time.monotonic() < deadline:
            if self._over.wait(self._interval_s):
                return True
        if not self._threads[1].is_alive() and not self._over.is_set():
            where = os.environ["MASTER_ADDR"]
            what = f"is cut off from other ranks and from the launcher on {where}, which must have ended"
            self._print(f"{self._mine.name} {what}: see the messages there.")
            return True
        return self._over.is_set()

    def _linger(self) -> None:
        """Wait until other machines have read the verdict: the launcher that holds it may exit with us."""
        if self._spread:
            time.sleep(3 * self._interval_s)

    # This rank

    def _look_inside(self) -> None:
        """Thread: record where the main thread is, and for how long. It never waits for other ranks."""
        seen, moves = look(self.progress), 0
        while not self._leaving and not self._over.is_set():
            before, moves_before = seen, moves
            seen, moves = look(self.progress), self.progress.moves
            still = self._still.advance(restart=moves != moves_before or _has_moved(before, seen))
            self._mine = dataclasses.replace(
                self._mine,
                moves=moves,
                still_s=still,
                waiting=seen.waiting,
                cur_nimg=self.progress.cur_nimg,
                at=seen.text,
            )
            unheard, self._heard = self._unheard.advance(restart=self._heard), False
            if still >= self._timeout_s and unheard >= self._timeout_s / 2:
                what = f"has not moved for {still:.0f} s, and the other ranks cannot be reached"
                self._end(self._verdict(self._mine.described(what)))
            time.sleep(self._interval_s)

    # The others

    def _look_around(self) -> None:
        """Thread: publish, read, judge. It ends without a store."""
        with suppress(dist.DistError, RuntimeError):
            store = launcher_store(timedelta(seconds=self._timeout_s))
            number, launcher = 0, os.getppid()
            while not self._over.is_set() and os.getppid() == launcher:  # its store ends with it
                number += 1
                leaving = self._leaving
                dataclasses.replace(self._mine, number=number, left=leaving).publish(store)
                if verdict := read_verdict(store):
                    self._end(verdict)
                elif verdict := self._judge(store):
                    self._end(verdict.publish(store))
                self._heard = True
                if leaving:
                    return
                self._watch_ends(store)
                self._ends.wait(self._interval_s)

    def _judge(self, store: Store) -> Verdict | None:
        if self._failure is not None:
            return self._failure
        return self._judge_ended(store) or self._judge_neighbour(store) or self._judge_all(store)

    def _watch_ends(self, store: Store) -> None:
        """Of this machine's ranks, once they have moved: what they published is not from an earlier
        attempt."""
        for rank, number in list(self._unwatched.items()):
            if (beat := read_beat(store, rank)) is None:
                continue
            if number is None:
                self._unwatched[rank] = beat.number
            elif beat.number != number:
                del self._unwatched[rank]
                if beat.process.is_near():
                    self._ends.watch(rank, beat.process.pid)

    def _judge_ended(self, store: Store) -> Verdict | None:
        for rank in self._ends.seen:
            if (beat := read_beat(store, rank)) is not None and not beat.left:
                return self._verdict(beat.described(_GONE))
        return None

    def _judge_neighbour(self, store: Store) -> Verdict | None:
        """Gone, or silent for too long?"""
        rank = (self._rank + 1) % self._world
        beat, before = read_beat(store, rank), self._neighbour
        self._neighbour = beat
        moved = beat is not None and (before is None or beat.number != before.number)
        self._awake |= moved and before is not None
        silent = self._silent.advance(restart=moved)
        if beat is None:
            if silent >= self._timeout_s:
                return self._verdict(f"rank {rank} has not started within {silent:.0f} s")
            return None
        if beat.left:
            return None
        if self._awake and not moved and beat.process.is_gone():
            if (last := read_beat(store, rank)) is not None and last.left:
                return None
            return self._verdict(beat.described(_GONE))
        if silent >= (_LOST_S if self._suspicious else self._timeout_s):
            state = "gone or cut off" if self._suspicious else "frozen or cut off"
            what = f"has not answered for {silent:.0f} s: it is {state}"
            return self._verdict(beat.described(what), frozen=beat.process)
        return None

    def _judge_all(self, store: Store) -> Verdict | None:
        """Once no rank has moved for too long: who is furthest behind?

        The first rank that has not left looks, for all of them: each reading the beats of all others would be
        a million reads a second from one store for a thousand ranks.
        """
        before = (read_beat(store, rank) for rank in range(self._rank))
        if self._still.seconds < self._timeout_s or not all(beat and beat.left for beat in before):
            return None
        beats = [read_beat(store, rank) for rank in range(self._world)]
        working = [beat for beat in beats if beat is not None and not beat.left]
        still = min(beat.still_s for beat in working)
        if None in beats or still < self._timeout_s:
            return None  # one is still working, or frozen, which its neighbour will see
        last = min(beat.moves for beat in working)
        behind = [beat for beat in working if beat.moves == last]
        behind = [beat for beat in behind if not beat.waiting] or behind
        if len(behind) == 1:
            return self._verdict(behind[0].described(f"is stuck: it has not moved for {still:.0f} s"))
        lines = [f"  {beat.name}: {beat.place}" for beat in behind]
        more = [f"  … and {len(lines) - 8} more"] if len(lines) > 8 else []
        text = f"no rank has moved for {still:.0f} s, and these are equally far behind:"
        return self._verdict("\n".join([text, *lines[:8], *more]))

    def _verdict(self, text: str, frozen: Process | None = None) -> Verdict:
        return Verdict(self._rank, text, frozen=frozen)

    # The end

    def _end(self, verdict: Verdict) -> None:
        """Exit, whatever the main thread is doing; the main rank has a moment to finish its reports."""
        leave = threading.Timer(_PATIENCE_S, _abandon)
        leave.daemon = True
        leave.start()
        if verdict.by == self._rank and not verdict.printed:
            self._print(verdict.text)
        if verdict.frozen is not None and verdict.frozen.is_near():
            with suppress(ProcessLookupError):
                os.kill(verdict.frozen.pid, signal.SIGKILL)
        self._over.set()
        if self._rank != 0 and not self._leaving:
            self._linger()
            end_process(1)

    def _print(self, text: str) -> None:
        self.record(text)
        lead = "\n" if sys.stderr.isatty() else ""  # there may be a progress bar on this line
        print(f"{lead}error: {text}", file=sys.stderr, flush=True)
        print(f"The job ends on all {self._world} ranks. {self.last_words()}", file=sys.stderr, flush=True)


def _has_moved(before: Whereabouts, now: Whereabouts) -> bool:
    """Outside of updates, any work counts: another place in the code, or reading and writing. Inside, where a
    network may loop for ever, only what all ranks do equally often counts."""
    return not now.updating and (now.trace != before.trace or now.traffic - before.traffic >= _TRAFFIC)


def _number(variable: str, default: int) -> int:
    return int(os.environ.get(variable) or default)


def _is_broken_connection(error: BaseException) -> bool:
    """Whether the error is one that another rank's end causes."""
    return isinstance(error, RuntimeError) and (
        isinstance(error, dist.DistError) or bool(_BROKEN.search(str(error)))
    )


def _abandon() -> None:
    if sys.stdout.isatty():
        print("\x1b[?25h")  # a progress bar hides the cursor
    os._exit(1)
