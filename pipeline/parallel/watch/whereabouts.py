"""What this process is doing, and where in the code, as another of its threads sees it."""

from __future__ import annotations

import os
import sys
import sysconfig
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import NamedTuple

import torch

from pipeline.garbage import uncollected

_ROOT = str(Path(__file__).resolve().parents[3]) + os.sep
_LIBRARY = sysconfig.get_paths()["stdlib"] + os.sep
_TORCH = str(Path(torch.__file__).parent) + os.sep
COLLECTIVES = (
    "torch/distributed/",
    "torch/autograd/",
    "deepspeed/",
    "pipeline/parallel/ranks.py",
    "pipeline/parallel/polls.py",
)


@dataclass
class Progress:
    """What this rank is doing, for the thread that watches it. The step only assigns to it."""

    moves: int = 0  # grows with everything that all ranks do equally often
    cur_nimg: int = 0
    doing: str = ""  # in words, as "saving a checkpoint"
    updating: bool = False  # inside an update of the networks

    @contextmanager
    def during(self, what: str, updating: bool | None = None) -> Iterator[None]:
        """Inside: what is being done, and whether it is part of an update (None: as outside)."""
        before = self.doing, self.updating
        self.doing, self.updating = what, self.updating if updating is None else updating
        try:
            yield
        finally:
            self.doing, self.updating = before


@dataclass(frozen=True)
class Whereabouts:
    """A look at the running code."""

    text: str
    updating: bool
    waiting: bool  # perhaps for other ranks
    trace: int  # changes when the code moves
    traffic: int  # bytes that this process has read and written so far


class Spot(NamedTuple):
    """Where a function is, of those that are running."""

    code: CodeType
    instruction: int
    line: int


def look(progress: Progress) -> Whereabouts:
    """Where the main thread is now."""
    main = threading.main_thread()
    # Threads that work for the main one (reading shards, say); not those that draw bars or send reports.
    working = [thread for thread in threading.enumerate() if thread is not main and not thread.daemon]
    stack, *others = _stacks([main, *working])
    own = next(filter(_is_own, stack), None)
    return Whereabouts(
        text=", ".join(filter(None, (progress.doing, own and _place(own)))),
        updating=progress.updating,
        waiting=bool(stack) and any(part in stack[0].code.co_filename for part in COLLECTIVES),
        trace=hash(tuple(spot[:2] for of_one in (stack, *others) for spot in of_one)),
        traffic=_traffic(),
    )


def _traffic() -> int:
    try:
        lines = Path("/proc/self/io").read_text().split()
    except OSError:
        return 0
    return int(lines[1]) + int(lines[3])  # rchar: … wchar: …


def _stacks(threads: Iterable[threading.Thread]) -> list[list[Spot]]:
    """What each of them runs, innermost first; empty for one that has ended.

    Garbage is not collected meanwhile. Before Python 3.12 a collection can begin as f_back makes its object,
    and a finalizer let the thread that is looked at run on: the frame is gone then, and Python crashes. In
    sys._current_frames it waits forever (github.com/python/cpython/issues/106883).
    """
    with uncollected():
        frames = sys._current_frames()
        try:
            return [list(_outwards(frames.get(thread.ident or 0))) for thread in threads]
        finally:
            frames.clear()  # this function's own is among them: a cycle that would keep what all of them hold


def _outwards(frame: FrameType | None) -> Iterator[Spot]:
    while frame is not None:
        yield Spot(frame.f_code, frame.f_lasti, frame.f_lineno)
        frame = frame.f_back


def _is_own(spot: Spot) -> bool:
    """Whether the line is of our code or the user's, not of Python or torch."""
    name = spot.code.co_filename
    python = name.startswith(("<", _LIBRARY)) and "site-packages" not in name
    return not python and not name.startswith(_TORCH)


def _place(spot: Spot) -> str:
    """The line, with the file's path from the checkout or the current folder."""
    name = spot.code.co_filename.removeprefix(_ROOT).removeprefix(str(Path.cwd()) + os.sep)
    return f"at {name}:{spot.line} ({spot.code.co_name})"
