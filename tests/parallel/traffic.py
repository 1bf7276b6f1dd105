"""What every rank of a training sends, phase by phase: `python -m traffic OUT CONFIG [KEY=VALUE …]` in each.

The kernel counts the bytes and segments of every connection. Between phases all ranks wait for each other by
files, until nothing is under way.
"""

from __future__ import annotations

import json
import os
import socket
import stat
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from pipeline import console, loop, train
from pipeline.parallel import ranks as meeting
from pipeline.parallel.ranks import Ranks
from pipeline.parallel.watch import watch
from pipeline.parallel.watch.beats import Beat
from pipeline.run.session import Session
from pipeline.run.stop import StopSignals

FIRST, LAST = 4, 24  # updates between which are counted
Counts = dict[
    str, list[int]
]  # of connections to peers, to the store, of the watch: bytes, segments, how many
# In Linux's struct tcp_info. Both counts hold what was sent again because a busy machine acknowledged late.
_BYTES_SENT, _BYTES_AGAIN, _SEGMENTS_OUT, _SEGMENTS_AGAIN = 200, 208, 156, 100
_QUIET_S = 0.05


def connections() -> Iterator[tuple[int, int, int, int]]:
    """Of every TCP connection of this process: its ports, and bytes and segments sent, each once."""
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
        try:
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as found:
                info = found.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                ports = found.getsockname()[1], found.getpeername()[1]
        except OSError:  # listens only, or has just been closed
            continue
        sent, again = (struct.unpack_from("<Q", info, at)[0] for at in (_BYTES_SENT, _BYTES_AGAIN))
        out, out_again = (struct.unpack_from("<I", info, at)[0] for at in (_SEGMENTS_OUT, _SEGMENTS_AGAIN))
        yield *ports, sent - again, out - out_again


class Meter:
    """Counts between marks, which all ranks pass together."""

    def __init__(self, out: Path) -> None:
        self._out, self._rank = out, int(os.environ["RANK"])
        self._world, self._port = int(os.environ["WORLD_SIZE"]), int(os.environ["MASTER_PORT"])
        self._lock, self._of_watch = threading.Lock(), set[int]()
        self._number = 0
        self._last: Counts = self._read()
        self.phases: dict[str, Counts] = {}
        self.held: Counts = {}
        self.beats, self.summed = 0, 0

    def store(self, connect: Callable[..., Any], of_watch: bool) -> Callable[..., Any]:
        """`connect`, which opens a connection to the store; noted if it is the watch's."""

        def connected(*arguments: Any) -> Any:
            with self._lock:
                before = {here for here, *_ in connections()}
                made = connect(*arguments)
                if of_watch:
                    self._of_watch |= {here for here, *_ in connections()} - before
            return made

        return connected

    def mark(self, phase: str | None) -> None:
        """End a phase; what was sent in it is kept if it has a name."""
        self._wait(f"end {phase}")
        now = self._read()
        while (later := self._wait_quiet()) != now:
            now = later
        if phase is not None:
            before = self._last
            self.phases[phase] = {k: [a - b for a, b in zip(now[k], before[k], strict=True)] for k in now}
        self._last = now
        self._wait(f"counted {phase}")

    def _wait_quiet(self) -> Counts:
        time.sleep(_QUIET_S)
        return self._read()

    def _read(self) -> Counts:
        counts = {kind: [0, 0, 0] for kind in ("peers", "store", "watch")}
        for here, there, sent, segments in connections():
            kind = "watch" if here in self._of_watch else "store" if there == self._port else "peers"
            counts[kind] = [a + b for a, b in zip(counts[kind], (sent, segments, 1), strict=True)]
        self.held, counts = counts, {kind: counts[kind] for kind in ("peers", "store")}
        return counts

    def _wait(self, name: str) -> None:
        """Until every rank is here."""
        self._number += 1
        place = self._out / f"{self._number:03d} {name}"
        place.mkdir(exist_ok=True)
        (place / str(self._rank)).touch()
        while len(list(place.iterdir())) < self._world:
            time.sleep(0.002)

    def write(self) -> None:
        held = {kind: values[2] for kind, values in self.held.items()}
        watched = self.held["watch"][:2]
        found = {"phases": self.phases, "held": held, "beats": self.beats, "watch": watched}
        found["summed"] = self.summed
        (self._out / f"rank-{self._rank}.json").write_text(json.dumps(found))


def measure(out: Path, arguments: list[str]) -> int:
    meter = Meter(out)
    watch.launcher_store = meter.store(watch.launcher_store, of_watch=True)
    meeting.launcher_store = meter.store(meeting.launcher_store, of_watch=False)
    publish = Beat.publish

    def published(beat: Beat, store: Any) -> None:
        publish(beat, store)
        meter.beats += 1

    Beat.publish = published  # type: ignore[method-assign]

    def around(owner: Any, name: str, phase: str, then: Callable[[Any], object] = lambda _: None) -> None:
        inner = getattr(owner, name)

        def outer(*given: Any, **named: Any) -> Any:
            meter.mark(None)
            result = inner(*given, **named)
            then(given[0])
            meter.mark(phase)
            return result

        setattr(owner, name, outer)

    inner = Ranks.sum

    def summed(ranks: Ranks, values: torch.Tensor) -> torch.Tensor:
        meter.summed = max(meter.summed, values.nbytes)  # of the tick: a save's is of one number
        return inner(ranks, values)

    Ranks.sum = summed  # type: ignore[method-assign]
    around(Ranks, "__init__", "join")
    around(Session, "tick", "tick")
    around(Session, "snapshot", "snapshot")
    around(Session, "save", "save", lambda session: session._saver.finish())
    around(Session, "conclude", "end")
    around(train, "agreed_data", "data")
    run, step, updates = loop.train, loop.train_step, iter(range(10**6))

    def trained(*given: Any) -> bool:
        meter.mark("start")
        return run(*given)

    def stepped(*given: Any) -> int:
        number = next(updates)
        if number == FIRST:
            meter.mark(None)
        elif number == LAST:
            meter.mark("updates")
        return step(*given)

    loop.train, loop.train_step = trained, stepped
    with closing(StopSignals()) as signals:
        status = train._main(arguments, signals)
    meter.write()
    return status


if __name__ == "__main__":
    console.end_process(measure(Path(sys.argv[1]), sys.argv[2:]))
