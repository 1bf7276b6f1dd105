"""When Python looks for cyclic garbage. Modules make none: of the time that importing torch takes, a quarter
is the search for it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Collect no garbage in the block."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@contextmanager
def importing() -> Iterator[None]:
    """Collect no garbage in a block that imports modules, and leave them out of every later search."""
    gc.disable()
    try:
        yield
    finally:
        imported()


def imported() -> None:
    """For a process that has imported what it needs, and began with `gc.disable()`: see `importing`."""
    gc.freeze()
    gc.enable()
