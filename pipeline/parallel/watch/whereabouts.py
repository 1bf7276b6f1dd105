"""What this process is doing, and where in the code, as another of its threads sees it."""

from __future__ import annotations

import os
import sys
import sysconfig
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

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


def look(progress: Progress) -> Whereabouts:
    """Where the main thread is now."""
    frames = sys._current_frames()
    main = threading.main_thread()
    # Threads that work for the main one (reading shards, say); not those that draw bars or send reports.
    working = [t.ident for t in threading.enumerate() if t is main or not t.daemon]
    places = [(f.f_code, f.f_lasti) for ident in working for f in _outwards(frames.get(ident or 0))]
    stack = list(_outwards(frames.get(main.ident or 0)))
    frame = next((frame for frame in stack if _is_own(frame)), None)
    return Whereabouts(
        text=", ".join(filter(None, (progress.doing, frame and _place(frame)))),
        updating=progress.updating,
        waiting=bool(stack) and any(part in stack[0].f_code.co_filename for part in COLLECTIVES),
        trace=hash(tuple(places)),
        traffic=_traffic(),
    )


def _traffic() -> int:
    try:
        lines = Path("/proc/self/io").read_text().split()
    except OSError:
        return 0
    return int(lines[1]) + int(lines[3])  # rchar: … wchar: …


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_own(frame: FrameType) -> bool:
    """Whether the line is of our code or the user's, not of Python or torch."""
    name = frame.f_code.co_filename
    python = name.startswith(("<", _LIBRARY)) and "site-packages" not in name
    return not python and not name.startswith(_TORCH)


def _place(frame: FrameType) -> str:
    """The line, with the file's path from the checkout or the current folder."""
    name = frame.f_code.co_filename.removeprefix(_ROOT).removeprefix(str(Path.cwd()) + os.sep)
    return f"at {name}:{frame.f_lineno} ({frame.f_code.co_name})"
