"""What ranks publish about themselves, and the verdict: why the job ends."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
from dataclasses import dataclass, field

from torch._C._distributed_c10d import Store

from pipeline.holder import kernel, pid_namespace, state_of
from pipeline.wording import in_kimg


@dataclass(frozen=True)
class Process:
    """One process among those of all hosts and containers."""

    host: str = field(default_factory=socket.gethostname)
    kernel: str = field(default_factory=kernel)  # machines may share a name
    pids: str = field(default_factory=pid_namespace)  # in which its pid means something
    pid: int = field(default_factory=os.getpid)

    def is_near(self) -> bool:
        """Whether its pid means something here."""
        return (self.kernel, self.pids) == (kernel(), pid_namespace())

    def is_gone(self) -> bool:
        """Whether it has certainly ended."""
        return self.is_near() and state_of(self.pid)[0] in "ZX"


@dataclass(frozen=True)
class Beat:
    """What a rank publishes about itself, about every second."""

    rank: int
    process: Process
    number: int = 0
    moves: int = 0
    still_s: float = 0.0  # for how long it has not moved
    waiting: bool = False
    cur_nimg: int = 0
    at: str = "starting"
    left: bool = False  # in good order

    @property
    def name(self) -> str:
        return f"rank {self.rank} ({self.process.host}, pid {self.process.pid})"

    @property
    def place(self) -> str:
        return f"at kimg {in_kimg(self.cur_nimg / 1000)}, {self.at}"

    def described(self, what: str) -> str:
        return f"{self.name} {what}. Last seen {self.place}."

    def publish(self, store: Store) -> None:
        store.set(f"watch/{self.rank}", json.dumps(dataclasses.asdict(self)))


def read_beat(store: Store, rank: int) -> Beat | None:
    """What a rank last published, if anything."""
    key = f"watch/{rank}"
    if not store.check([key]):
        return None
    values = json.loads(store.get(key))
    return Beat(**values | {"process": Process(**values["process"])})


@dataclass(frozen=True)
class Verdict:
    """Why the job ends."""

    by: int  # the rank that saw it
    text: str
    printed: bool = False  # by the rank that failed
    frozen: Process | None = None  # cannot exit by itself

    def publish(self, store: Store) -> Verdict:
        """Returns the first verdict, which counts."""
        store.compare_set("watch/verdict", "", json.dumps(dataclasses.asdict(self)))
        return read_verdict(store) or self


def read_verdict(store: Store) -> Verdict | None:
    if not store.check(["watch/verdict"]):
        return None
    values = json.loads(store.get("watch/verdict"))
    frozen = values["frozen"] and Process(**values["frozen"])
    return Verdict(**values | {"frozen": frozen})
