"""The plan: complete epochs, one integer of state, parts that are disjoint and cover everything."""

from __future__ import annotations

import hashlib
import pickle
import tracemalloc
from collections import Counter

import numpy as np
import pytest

from pipeline.config import UserError
from pipeline.data.plan import Split, permutation

LAYOUTS = {
    "one shard": [23],
    "even": [10] * 12,
    "uneven": [1, 97, 3, 40, 0, 2, 64],
    "single samples": [1] * 29,
    "many": [5 + i % 3 for i in range(60)],
}
SPLITS = [(0.0, None, 0), (0.1, None, 0), (0.37, None, 0), (0.1, 3, 0), (0.1, 3, 2), (0.0, 5, 4)]


def pairs(array: np.ndarray) -> list[tuple[int, int]]:
    return [(shard, row) for shard, row in array.tolist()]


def everything(sizes: list[int]) -> set[tuple[int, int]]:
    return {(shard, row) for shard, n in enumerate(sizes) for row in range(n)}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [1, 4, 100])
def test_every_epoch_has_every_sample_once(layout: str, split: tuple, window: int) -> None:
    sizes = LAYOUTS[layout]
    training = Split(sizes, 3, window, *split).training()
    held = Split(sizes, 3, window, *split).heldout()
    assert training.size + held.size == sum(sizes)
    epochs = [pairs(training.samples(epoch * training.size, training.size)) for epoch in range(3)]
    once = set(epochs[0])
    for epoch in epochs:
        assert len(epoch) == training.size and set(epoch) == once
    if training.size > 10:
        assert epochs[0] != epochs[1] != epochs[2], "epochs must differ in order"
    out = set(pairs(held.samples(0, held.size)))
    assert len(out) == held.size
    assert once | out == everything(sizes) and not once & out


def test_samples_do_not_depend_on_how_they_are_asked_for() -> None:
    plan = Split(LAYOUTS["uneven"], 5, 2, 0.2).training()
    whole = pairs(plan.samples(0, 4 * plan.size))
    rng = np.random.default_rng(0)
    for position in rng.integers(0, 3 * plan.size, 200).tolist():
        count = int(rng.integers(0, plan.size))
        assert pairs(plan.samples(position, count)) == whole[position : position + count]


def test_a_window_keeps_its_shards_together() -> None:
    plan = Split([10] * 40, 0, 4).training()
    order = plan.samples(0, plan.size)[:, 0].reshape(10, 40)
    for window in order:
        assert len(set(window.tolist())) == 4
        assert len(set(window[:10].tolist())) > 1, "samples of a window are mixed"


def test_a_window_may_be_larger_than_the_data() -> None:
    whole, larger = (Split([4, 7, 3], 0, window, 0.0).training() for window in (3, 10**30))
    assert larger.window == 3
    assert np.array_equal(whole.samples(0, 40), larger.samples(0, 40))


def test_order_is_pinned() -> None:
    """The same on every machine and every numpy. Whoever must change it raises _VERSION."""
    assert permutation(10, 1, 2, 3).tolist() == [8, 1, 9, 3, 7, 5, 2, 0, 4, 6]
    plan = Split([7, 100, 30], 2**62 + 1, 2, 0.1).training()
    order = plan.samples(100, 300).astype("<i8").tobytes()
    assert hashlib.sha256(order).hexdigest()[:16] == "566ef4311b2d0a18"


def test_seed_changes_order_and_split() -> None:
    a, b = (Split([50] * 8, seed, 2, 0.1).training() for seed in (1, 2))
    assert pairs(a.samples(0, 50)) != pairs(b.samples(0, 50))
    assert set(pairs(a.samples(0, a.size))) != set(pairs(b.samples(0, b.size)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("folds", [2, 3, 7])
def test_folds_are_disjoint_and_cover(layout: str, folds: int) -> None:
    sizes = LAYOUTS[layout]
    parts = []
    for fold in range(folds):
        held = Split(sizes, 11, 4, 0.3, folds, fold).heldout()
        training = Split(sizes, 11, 4, 0.3, folds, fold).training()
        parts.append(pairs(held.samples(0, held.size)))
        assert not set(parts[-1]) & set(pairs(training.samples(0, training.size)))
    assert Counter(pair for part in parts for pair in part) == Counter(everything(sizes))
    smallest, largest = min(map(len, parts)), max(map(len, parts))
    assert largest - smallest <= max(1, 0.11 * sum(sizes) / folds)


def test_whole_shards_are_held_out_where_that_meets_the_share() -> None:
    held = Split([1000] * 70, 0, 16, 0.1).heldout()
    assert sorted(set(held.counts.tolist())) == [0, 1000] and held.size == 7000 and held.whole_shards
    few = Split([100] * 5, 0, 16, 0.1).heldout()
    assert few.size == 50 and not few.whole_shards and (few.counts == 10).all()


@pytest.mark.parametrize("holdout", [0.001, 0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_share_held_out(layout: str, holdout: float) -> None:
    total = sum(LAYOUTS[layout])
    held = Split(LAYOUTS[layout], 0, 16, holdout).heldout().size
    assert abs(held - total * holdout) <= max(1, 0.06 * total * holdout)
    assert 0 < held < total


@pytest.mark.parametrize("world", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("limit", [None, 1, 17, 10_000])
def test_chunks_give_every_rank_as_many_forwards(world: int, limit: int | None) -> None:
    plan = Split(LAYOUTS["many"], 0, 4, 0.3).heldout()
    chunks = [list(plan.chunks(rank, world, 5, limit)) for rank in range(world)]
    assert len({len(mine) for mine in chunks}) == 1
    seen = [pair for mine in chunks for samples, count in mine for pair in pairs(samples)]
    assert all(len(samples) == count <= 5 for mine in chunks for samples, count in mine)
    total = plan.size if limit is None else min(limit, plan.size)
    assert sorted(seen) == sorted(pairs(plan.samples(0, total)))
    assert set(pairs(plan.samples(0, total))) <= set(pairs(plan.samples(0, plan.size)))


def test_a_last_chunk_is_shared_out() -> None:
    plan = Split([28], 0, 4, 0.999).heldout()
    assert [[count for _, count in plan.chunks(rank, 3, 5)] for rank in range(3)] == [[5, 4]] * 3


def test_nothing_held_out() -> None:
    held = Split([10, 10], 0, 4).heldout()
    assert held.size == 0 and list(held.chunks(0, 2, 8)) == []


def test_epoch_is_a_fraction() -> None:
    plan = Split([10, 10], 0, 4).training()
    assert plan.epoch(0) == 0 and plan.epoch(30) == 1.5


def test_fingerprint_knows_everything_the_order_depends_on() -> None:
    arguments = [
        ([10, 20], 0, 4, 0.1, None, 0),
        ([20, 10], 0, 4, 0.1, None, 0),
        ([10, 20], 1, 4, 0.1, None, 0),
    ]
    arguments += [([10, 20], 0, 5, 0.1, None, 0), ([10, 20], 0, 4, 0.2, None, 0), ([10, 20], 0, 4, 0.1, 2, 0)]
    arguments += [([10, 20], 0, 4, 0.1, 2, 1)]
    prints = [kind(Split(*a)).fingerprint for a in arguments for kind in (Split.training, Split.heldout)]
    assert len(set(prints)) == len(prints)
    assert Split(*arguments[0]).training().fingerprint == prints[0]
    assert Split([10, 20], 0, 4, 0.9, 2, 1).training().fingerprint == prints[-2], "folds replace holdout"


def test_pickled_plan_is_the_same() -> None:
    plan = Split(LAYOUTS["uneven"], 5, 2, 0.2).training()
    plan.samples(0, 10)
    again = pickle.loads(pickle.dumps(plan))
    assert pairs(again.samples(33, 400)) == pairs(plan.samples(33, 400))


def test_a_hundred_million_samples() -> None:
    tracemalloc.start()
    try:
        plan = Split([10_000] * 10_000, 0, 16, 0.1).training()
        assert plan.size == 90_000_000
        plan.samples(10**9 + 7, 4096)
        assert tracemalloc.get_traced_memory()[1] < 40e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("sizes", "split", "message"),
    [
        ([1], (0.5, None, 0), "data.holdout=0"),
        ([2], (0.1, 3, 0), "data.folds"),
        ([0, 0], (0.0, None, 0), "nothing to train on: no samples, or all"),
    ],
)
def test_what_cannot_be_split(sizes: list[int], split: tuple, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Split(sizes, 0, 4, *split).training()
