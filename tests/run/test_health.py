"""What a tick's figures lead to: a warning once, not at every tick, or the end."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from pipeline.config import Run
from pipeline.errors import RunError
from pipeline.parallel.fragments import checksum
from pipeline.run.health import BITS, FORWARD, ORDER, Health, slowest
from pipeline.run.report import Report
from pipeline.run.sample_grids import spread
from pipeline.run.stats import Reduced


class Warnings(Report):
    def __init__(self) -> None:
        self.told: list[str] = []

    def warn(self, title: str, text: str) -> None:
        self.told.append(f"{title}: {text}")


@pytest.fixture
def warnings() -> Warnings:
    return Warnings()


def health(warnings: Warnings, world: int = 3, strategy: str = "ddp", shards: int = 1, **run: int) -> Health:
    ranks = SimpleNamespace(world=world, strategy=strategy, shards=shards)
    return Health(Run(**run), ranks, warnings, {})  # type: ignore[arg-type]


def tick(values=None, updates=None, each=None, broken=None) -> Reduced:
    return Reduced(values or {}, {}, updates or {}, each or {}, broken or {})


@pytest.mark.parametrize("paired", [False, True])
def test_d_that_wins_is_told_once_and_again_only_after_it_has_not_won(warnings, paired):
    judge = health(warnings)
    of_pairs = [{"Loss/signs/real": 1.0, "Loss/signs/fake": 1.0, "Loss/signs/paired": s} for s in (1.0, 0.5)]
    of_each = [{"Loss/signs/real": s, "Loss/signs/fake": -s} for s in (1.0, 0.5)]
    won, even = of_pairs if paired else of_each
    for _ in range(60):
        judge.check(tick(won))
    assert len(warnings.told) == 1 and warnings.told[0].startswith("D has won")
    judge.check(tick(even))
    for _ in range(24):
        judge.check(tick(won))
    assert len(warnings.told) == 1
    judge.check(tick(won))
    assert len(warnings.told) == 2


@pytest.mark.parametrize(("strategy", "told"), [("ddp", 1), ("zero2", 1), ("fsdp2", 0), ("zero3", 0)])
def test_a_slow_rank_is_named_where_forward_passes_wait_for_nobody(warnings, strategy, told):
    judge = health(warnings, strategy=strategy)
    for _ in range(40):
        judge.check(tick(each={FORWARD: [1.0, 1.1, 2.5]}))
    assert len(warnings.told) == told
    assert all("rank 2 takes 2.3 times as long" in text for text in warnings.told)
    assert slowest([1.0, 1.1, 2.5]) == {
        "Timing/forward_sec_fastest": 1.0,
        "Timing/forward_sec_median": 1.1,
        "Timing/forward_sec_slowest": 2.5,
        "Timing/slowest_rank": 2.0,
    }


def test_ranks_of_equal_pace_are_not_suspected(warnings):
    judge = health(warnings)
    for _ in range(40):
        judge.check(tick(each={FORWARD: [1.0, 1.1, 1.4]}))
    assert warnings.told == []


def test_the_replica_that_differs_is_named(warnings):
    with pytest.raises(RunError, match="copy of G on rank 1 differs from the others"):
        health(warnings).check(tick(each={f"{BITS}G": [5.0, 6.0, 5.0]}))
    with pytest.raises(RunError, match="one of the ranks 0 and 1"):
        health(warnings, world=2).check(tick(each={f"{BITS}G": [5.0, 6.0]}))
    health(warnings).check(tick(each={f"{BITS}G": [5.0, 5.0, 5.0]}))


def test_parts_of_a_copy_are_compared_with_the_same_parts_of_the_others(warnings):
    """hsdp, two ranks to a copy."""
    hybrid = {"strategy": "hsdp", "shards": 2}
    health(warnings, world=4, **hybrid).check(tick(each={f"{BITS}D": [5.0, 7.0, 5.0, 7.0]}))
    with pytest.raises(RunError, match="copy of D on one of the ranks 1 and 3 differs"):
        health(warnings, world=4, **hybrid).check(tick(each={f"{BITS}D": [5.0, 7.0, 5.0, 8.0]}))
    with pytest.raises(RunError, match="copy of D on rank 2 differs from the others"):
        health(warnings, world=6, **hybrid).check(tick(each={f"{BITS}D": [5.0, 7.0, 6.0, 7.0, 5.0, 7.0]}))


def test_ranks_that_run_other_layers_end_the_run(warnings):
    with pytest.raises(RunError, match=r"not run the same layers of G in the same order\. fsdp2 gathers"):
        health(warnings, strategy="fsdp2").check(tick(each={f"{ORDER}G": [5.0, 5.0, 6.0]}))
    health(warnings, strategy="fsdp2").check(tick(each={f"{ORDER}G": [5.0, 5.0, 5.0]}))


def test_a_few_skipped_updates_are_told_and_many_end_the_run(warnings):
    updates = {"Gradients/G/skipped": 10.0}
    broken = {"Loss/G/adversarial": [2]}
    judge = health(warnings, max_skipped=2)
    judge.check(tick({"Gradients/G/skipped": 0.2}, updates, broken=broken))
    assert "2 of the 10 updates of G" in warnings.told[0] and "on rank 2" in warnings.told[0]
    with pytest.raises(RunError, match=r"3 of the 10 updates of G.*max_skipped = 2"):
        judge.check(tick({"Gradients/G/skipped": 0.3}, updates, broken=broken))


def test_of_many_broken_charts_few_are_named(warnings):
    everywhere = {f"Loss/{number}": [0, 1, 2] for number in range(5)}
    told = tick({"Gradients/G/skipped": 0.2}, {"Gradients/G/skipped": 10.0}, broken=everywhere | {"A": [2]})
    health(warnings, max_skipped=2).check(told)
    assert "(Loss/0, Loss/1, Loss/2 and 2 more on all ranks; A on rank 2)" in warnings.told[0]


@pytest.mark.parametrize("updates", [1, 3, 8])
def test_ticks_of_fewer_updates_than_may_be_skipped_add_up_over_restarts(warnings, updates):
    counted: dict[str, int] = {}
    nothing_moves = tick({"Gradients/D/skipped": 1.0}, {"Gradients/D/skipped": float(updates)})
    with pytest.raises(RunError, match=r"(\d+) of the \1 updates of D in the last ticks .*max_skipped = 10"):
        for _ in range(100):
            judge = Health(Run(), SimpleNamespace(world=1, strategy="single", shards=1), warnings, counted)  # type: ignore[arg-type]
            judge.check(nothing_moves)
    assert len(warnings.told) == 10 // updates


def test_skips_that_leave_most_of_a_tick_do_not_add_up(warnings):
    judge = health(warnings)
    for _ in range(50):
        judge.check(tick({"Gradients/G/skipped": 0.25}, {"Gradients/G/skipped": 8.0}))
    judge.check_end()
    assert len(warnings.told) == 50


def test_a_run_that_ends_without_moving_is_not_finished(warnings):
    judge = health(warnings)
    judge.check(tick({"Gradients/G/skipped": 0.75}, {"Gradients/G/skipped": 4.0}))
    with pytest.raises(RunError, match=r"3 of the last 4 updates of G .* not finished"):
        judge.check_end()
    judge.check(tick({"Gradients/G/skipped": 0.0}, {"Gradients/G/skipped": 4.0}))
    judge.check_end()


def test_a_short_run_is_judged_too(warnings):
    judge = health(warnings, total_kimg=40, tick_kimg=4)
    for _ in range(5):
        assert warnings.told == []
        judge.check(tick({"Loss/signs/real": 1.0, "Loss/signs/fake": -1.0}))
    assert len(warnings.told) == 1


def test_a_score_that_is_no_number_is_told(warnings):
    health(warnings).compare_score("kid", float("nan"), None)
    assert len(warnings.told) == 1 and "kid is nan" in warnings.told[0]


def test_a_suspicion_outlives_a_restart(warnings):
    """Two scores in a row, in two jobs: what the first has counted is part of the run's state."""
    counted: dict[str, int] = {}
    for _ in range(2):
        assert warnings.told == []
        judge = Health(Run(), SimpleNamespace(world=1, strategy="single", shards=1), warnings, counted)  # type: ignore[arg-type]
        judge.compare_score("kid", 2.5, (1.0, 100))
    assert len(warnings.told) == 1


def test_a_score_far_behind_its_best_is_told_when_it_stays_there(warnings):
    judge = health(warnings)
    for score in (0.5, 0.9, 1.1):
        judge.compare_score("kid_efflite0", score, (0.5, 40_000))
    assert warnings.told == []
    judge.compare_score("kid_efflite0", 1.2, (0.5, 40_000))
    assert len(warnings.told) == 1 and "0.5 at kimg 40" in warnings.told[0]


def test_images_that_are_all_alike_are_told(warnings):
    generator = torch.Generator().manual_seed(0)
    reals = torch.randint(0, 256, (64, 1, 8, 8), generator=generator, dtype=torch.uint8)
    collapsed = reals[:1].expand(64, -1, -1, -1)
    assert spread(collapsed) == 0 and spread(reals) == pytest.approx(255 / 12**0.5, rel=0.05)
    judge = health(warnings)
    for _ in range(3):
        judge.compare_diversity(spread(reals[32:]), spread(reals[:32]))
    assert warnings.told == []
    for _ in range(3):
        judge.compare_diversity(spread(collapsed), spread(reals))
    assert len(warnings.told) == 1 and "0% as much" in warnings.told[0]


def test_any_bit_of_any_weight_changes_the_checksum():
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(7, 5, generator=generator), torch.randn(3, generator=generator), torch.empty(0)]
    before = checksum(tensors)
    assert before == float(int(before))
    for bit in range(31):
        tensors[1][1:2].view(torch.int32).bitwise_xor_(1 << bit)
        assert checksum(tensors) != before
        tensors[1][1:2].view(torch.int32).bitwise_xor_(1 << bit)
    assert checksum(tensors) == before
