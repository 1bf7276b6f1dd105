"""One, two and three processes, started by the written-out line, train the same networks."""

from __future__ import annotations

import math

import pytest
from launching import AFTER_20, UPDATES, identical, largest_difference, without_clocks


@pytest.mark.parametrize("world", [2, 3])
def test_sgd_ends_at_the_same_weights_after_20_updates(worlds, world):
    difference = largest_difference(worlds.sgd[1].exported(), worlds.sgd[world].exported())
    assert difference <= 1e-6


@pytest.mark.parametrize("world", [2, 3])
def test_adam_ends_at_the_same_weights_after_20_updates(worlds, world, scratch):
    """1e-5 is promised, as Adam's division amplifies the rounding of gradients near zero. With a penalty on
    every kernel there are none (2λw is far above rounding), so that here it is as good as SGD."""
    one = worlds.adam[1].exported_at(AFTER_20, scratch())
    many = worlds.adam[world].exported_at(AFTER_20, scratch())
    assert largest_difference(one, many) <= 1e-6


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_metrics_are_the_same(worlds, kind, world):
    """Losses, penalties, norms, scores of D and (under Adam) the score on held-out images."""
    runs = getattr(worlds, kind)
    one, many = ([r for r in runs[w].rows if r["cur_nimg"] <= AFTER_20] for w in (1, world))
    assert len(one) == len(many) == (UPDATES if kind == "sgd" else 3)  # with the score before training
    for a, b in zip(map(without_clocks, one), map(without_clocks, many), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert math.isclose(a[key], b[key], rel_tol=1e-4, abs_tol=1e-6), key


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_augmentation_adapts_alike(worlds, kind):
    """Exactly, as p follows integers; and it is above 0 in time for other tests of these runs to see it."""
    one, *others = ([row.get("Progress/augment_p") for row in r.rows] for r in getattr(worlds, kind).values())
    upto = UPDATES if kind == "sgd" else 3
    assert all(p[:upto] == one[:upto] for p in others)
    assert max(one[1:upto]) > 0.2 and (kind == "adam" or 0.0 in one)


def test_the_comparison_can_fail(worlds, scratch):
    """Twenty updates move the weights by much more than the tolerances, and the two kinds differ."""
    early, late = (worlds.sgd[2].exported_at(n * 12, scratch()) for n in (1, UPDATES))
    assert largest_difference(early, late) > 1e-2
    assert identical(late, worlds.sgd[2].exported())
