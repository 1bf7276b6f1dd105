"""Where this process is in the code, in words, as another of its threads sees it: the step says nothing."""

from __future__ import annotations

import os
import sys
import sysconfig
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

_OURS = str(Path(__file__).resolve().parents[2]) + os.sep
_LIBRARY = sysconfig.get_paths()["stdlib"] + os.sep
_TORCH = str(Path(torch.__file__).parent) + os.sep

# What is being done, by (file of ours, function). The innermost one counts.
_DOING = {
    ("engine", "__call__"): "in the forward of {network}",
    **{(file, "backward"): "in the backward of {turn}" for file in ("masters", "zero")},
    **{(file, "step"): "in the step of {turn}" for file in ("masters", "zero")},
    ("session", "timed"): "waiting for data",
    ("session", "save"): "saving a checkpoint",
    ("session", "finish_saves"): "saving a checkpoint",
    ("session", "evaluate"): "evaluating",
    ("session", "snapshot"): "drawing samples",
    ("session", "tick"): "reporting",
    ("train", "prepare_data"): "reading the index of the data",
    ("train", "build"): "building the networks",
    ("train", "_resume"): "loading a checkpoint",
    ("train", "_open_report"): "starting its reports",
    ("train", "_conclude"): "exporting",
    ("ranks", "__init__"): "joining the other ranks",
}
_OTHERS = ("torch/distributed/", "torch/autograd/", "deepspeed/", "pipeline/parallel/ranks.py")


@dataclass
class Progress:
    """What this rank has got to: noted by plain assignments as it goes, and by nothing else in the step."""

    moves: int = 0  # grows with everything that all ranks do equally often
    cur_nimg: int = 0
    turn: str = ""  # whose update it is, G's or D's
    network: str = ""  # which was called last


@dataclass(frozen=True)
class Whereabouts:
    """A look at the running code."""

    text: str
    updating: bool  # inside an update of the networks
    waiting: bool  # where it may be other ranks that are waited for
    trace: int  # another number means that the code has moved
    traffic: int  # bytes that this process has read and written so far


def look(progress: Progress) -> Whereabouts:
    """Where the main thread is now."""
    frames = sys._current_frames()
    main = threading.main_thread()
    # Threads that do the main one's work (reading shards, say); not those that draw bars or send reports.
    working = [t.ident for t in threading.enumerate() if t is main or not t.daemon]
    places = [(f.f_code, f.f_lasti) for ident in working for f in _outwards(frames.get(ident or 0))]
    stack = list(_outwards(frames.get(main.ident or 0)))
    return Whereabouts(
        text=_in_words(stack, progress),
        updating=any(_part(frame) == ("step", "train_step") for frame in stack),
        waiting=bool(stack) and any(part in stack[0].f_code.co_filename for part in _OTHERS),
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


def _in_words(stack: list[FrameType], progress: Progress) -> str:
    """What is being done, and the innermost line of code that is not a library's."""
    doing = next((text for frame in stack if (text := _DOING.get(_part(frame)))), "")
    names = {"turn": progress.turn or "a network", "network": progress.network or "a network"}
    frame = next((frame for frame in stack if _is_own(frame)), None)
    if frame is None:
        return doing.format_map(names)
    place = f"{_short(frame.f_code.co_filename)}:{frame.f_lineno} ({frame.f_code.co_name})"
    return f"{doing.format_map(names)}, at {place}".removeprefix(", ")


def _part(frame: FrameType) -> tuple[str, str]:
    """(file, function) of a frame of ours."""
    name = frame.f_code.co_filename
    return (Path(name).stem, frame.f_code.co_name) if name.startswith(_OURS) else ("", "")


def _is_own(frame: FrameType) -> bool:
    """Not Python's or torch's: a line that tells the reader of the message something."""
    name = frame.f_code.co_filename
    python = name.startswith(("<", _LIBRARY)) and "site-packages" not in name
    return not python and not name.startswith(_TORCH)


def _short(name: str) -> str:
    """As a person in the project's or the run's folder would call the file."""
    return name.removeprefix(str(Path(_OURS).parent) + os.sep).removeprefix(str(Path.cwd()) + os.sep)
