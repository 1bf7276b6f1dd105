"""What a watched rank says of itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

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


@pytest.mark.parametrize("place", COLLECTIVES)
def test_the_places_where_ranks_wait_are_there(place):
    """Renamed, none of them would be taken for waiting, and who waits could be blamed."""
    roots = (Path(torch.__file__).parents[1], Path(ranks.__file__).parents[2])
    assert any((root / place).exists() for root in roots)
