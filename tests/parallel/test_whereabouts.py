"""What a watched rank says of itself."""

from __future__ import annotations

import pytest

from pipeline.parallel import ranks
from pipeline.parallel.watch.whereabouts import COLLECTIVES, Progress, look


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


def test_our_own_waiting_for_ranks_is_known_as_such():
    assert ranks.__file__.endswith(COLLECTIVES[-1])
