"""The parity matrix sees mistakes: known ones are put into the training, and the comparison finds each."""

from __future__ import annotations

import mutant
import pytest

from launch import selfcheck
from launch.selfcheck import parity

CASES = {case.name: case for case in parity.cases()}


def wrong(folder, case):
    """What the comparison finds in a training."""
    raised = folder / mutant.RAISED
    if raised.exists():
        return [raised.read_text()]
    found = selfcheck.differences(selfcheck.read(folder, case), selfcheck.expected(CASES[case]))
    return [(what, error) for column, what, error in found if error > selfcheck.tolerance(column)]


@pytest.mark.parametrize("case", mutant.CASES)
@pytest.mark.parametrize(
    ("name", "mistake"), [(name, mistake) for name, made in mutant.MADE.items() for mistake in made]
)
def test_a_mistake_is_seen(launched, name, mistake, case):
    found = wrong(launched(name) / "mistakes" / mistake, case)
    assert bool(found) == (mistake != "none"), found
