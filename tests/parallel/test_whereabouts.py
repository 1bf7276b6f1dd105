"""What a watched rank says of itself."""

from __future__ import annotations

import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch

from pipeline.garbage import uncollected
from pipeline.parallel import ranks
from pipeline.parallel.watch.whereabouts import COLLECTIVES, Progress, look

COLLECTING = """
import gc, threading
from pipeline.parallel.watch.whereabouts import Progress, look

inside, leave, left = threading.Event(), threading.Event(), threading.Event()

class Cycle:
    def __init__(self):
        self.itself = self

    def __del__(self):
        leave.set()
        left.wait()

def waits(depth):
    if depth:
        return waits(depth - 1)
    inside.set()
    leave.wait()

def overwrites(depth):
    a = b = c = d = e = depth
    return overwrites(depth - 1) + a if depth else 0

def watch(objects):
    inside.wait()
    gc.disable()
    gc.collect()
    Cycle()
    gc.set_threshold(objects)  # so many later, garbage is collected
    gc.enable()
    look(Progress())
    gc.set_threshold(700)
    assert gc.isenabled()
    leave.set()

for objects in range(1, 80):
    for event in (inside, leave, left):
        event.clear()
    watching = threading.Thread(target=watch, args=[objects])
    watching.start()
    waits(20)
    overwrites(60)
    left.set()
    watching.join()
print("looked")
"""


def test_what_is_being_done_is_that_of_the_innermost_block():
    progress = Progress()
    with progress.during("in an update", updating=True):
        with progress.during("waiting for data"):
            seen = look(progress)
        assert (progress.doing, progress.updating) == ("in an update", True)
    assert seen.updating and not seen.waiting
    assert seen.text.startswith("waiting for data, at pipeline")
    assert look(progress).text.startswith("at ") and not look(progress).updating


def test_it_is_forgotten_when_it_fails():
    progress = Progress()
    with pytest.raises(ValueError), progress.during("in an update", updating=True):
        raise ValueError
    assert (progress.doing, progress.updating) == ("", False)


def test_a_look_keeps_nothing_alive():
    """Not even until garbage is collected: a frame has all of an update's tensors."""

    def looked_at() -> weakref.ref[torch.Tensor]:
        tensor = torch.zeros(1)
        watching = threading.Thread(target=look, args=[Progress()])
        watching.start(), watching.join()
        return weakref.ref(tensor)

    with uncollected():
        assert looked_at()() is None


def test_code_that_runs_on_while_garbage_is_collected_is_looked_at():
    """The interpreter crashed: a finalizer let the main thread leave the frames that were looked at."""
    ended = subprocess.run([sys.executable, "-c", COLLECTING], check=False, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "looked\n"), ended.stderr


@pytest.mark.parametrize("place", COLLECTIVES)
def test_the_places_where_ranks_wait_are_there(place):
    """Renamed, none of them would be taken for waiting, and who waits could be blamed."""
    roots = (Path(torch.__file__).parents[1], Path(ranks.__file__).parents[2])
    assert any((root / place).exists() for root in roots)
