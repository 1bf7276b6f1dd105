"""What the parity matrix is worth: known mistakes are put into the training, and the comparison sees each."""

from __future__ import annotations

from functools import lru_cache

import mutant
import pytest
from launches import run

from launch import selfcheck
from launch.selfcheck import parity

CASES = {case.name: case for case in parity.cases()}
EVERYWHERE = ("none", "doubled-penalty", "penalty-over-world", "gradients-left-in-D")
# Where a mistake can be made at all. What is not reduced under ZeRO 1 to 3 but the norm, DeepSpeed reduces.
MADE = {
    "ddp-2": (*EVERYWHERE, "gradients-not-reduced"),
    "fsdp2-2": (*EVERYWHERE, "gradients-not-reduced", "norm-not-reduced"),
    "zero2-2": (*EVERYWHERE, "norm-not-reduced"),
    "zero3-2": (*EVERYWHERE, "norm-not-reduced", "padding-counted"),
}


@pytest.fixture(scope="module")
def with_mistakes(tmp_path_factory):
    """ "strategy-world" → a folder of what it trained with each of its mistakes in turn."""

    @lru_cache
    def launch(name):
        out = tmp_path_factory.mktemp(f"mistakes-{name}")
        # Last, as it may end the training.
        run(name, ["mutant", ",".join(sorted(MADE[name], key="gradients-left-in-D".__eq__)), str(out)])
        return out

    return launch


def wrong(folder, case):
    """What the comparison finds wrong with a training."""
    raised = folder / mutant.RAISED
    if raised.exists():
        return [raised.read_text()]
    found = selfcheck.differences(selfcheck.read(folder, case), selfcheck.expected(CASES[case]))
    return [(what, error) for column, what, error in found if error > selfcheck.tolerance(column)]


@pytest.mark.parametrize("case", mutant.CASES)
@pytest.mark.parametrize(("name", "mistake"), [(name, m) for name, made in MADE.items() for m in made])
def test_a_mistake_is_seen(with_mistakes, name, mistake, case):
    found = wrong(with_mistakes(name) / mistake, case)
    assert bool(found) == (mistake != "none"), found


def test_a_mistake_is_seen_in_one_process(tmp_path):
    mistakes = ["none", "doubled-penalty", "gradients-left-in-D"]
    mutant.main(mistakes, tmp_path)
    for mistake in mistakes:
        for case in mutant.CASES:
            found = wrong(tmp_path / mistake, case)
            assert bool(found) == (mistake != "none"), found
