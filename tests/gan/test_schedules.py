"""What an update depends on besides weights and data is a function of the images shown."""

import pytest

from pipeline.config import load
from pipeline.gan.schedules import Rates, at, ema_beta, lazy_factor


def test_rates_are_the_configs_at_any_time():
    config = load(None, ["data.train=x", "optim.D.lr=3e-4", "optim.G.betas=[0.0,0.99]"])
    for cur_nimg in (0, 64, 10**9):
        now = at(config, cur_nimg)
        assert Rates(3e-4, (0.5, 0.999), l2=0.0, l1=0.0) == now.D
        assert Rates(2e-4, (0.0, 0.99), l2=0.0, l1=0.0) == now.G
        assert now == at(config, cur_nimg)


def test_the_average_goes_by_the_images_of_a_whole_update():
    config = load(None, ["data.train=x", "loss.D_steps=2", "ema.kimg=10", "ema.rampup=0.05"])
    assert at(config, 64_000).ema_beta == ema_beta(128, 10, 0.05, 64_000)


def test_r1_is_due_in_every_interval_th_update_of_D_and_counts_interval_times():
    config = load(None, ["data.train=x", "data.batch_size=8", "penalty.r1.gamma=2", "penalty.r1.interval=3"])
    turns = [at(config, 8 * update) for update in range(7)]
    (penalties,) = zip(*(now.gradient_penalties for now in turns), strict=True)
    assert {(p.name, p.on, p.gamma) for p in penalties} == {("r1", "real", 2.0)}
    assert [p.factor for p in penalties] == [3, 0, 0, 3, 0, 0, 3]
    assert [now.differentiates("real") for now in turns] == [p.factor > 0 for p in penalties]
    assert not any(now.differentiates("fake") for now in turns)


def test_without_gamma_there_is_no_penalty():
    assert at(load(None, ["data.train=x"]), 0).gradient_penalties == ()
    assert at(load(None, ["data.train=x"]), 0).path is None


def test_path_length_is_due_in_every_interval_th_update_of_G_the_first_included():
    """G's turn begins after the images of its update's two D steps."""
    path = ("penalty.path.weight=2", "penalty.path.interval=3", "penalty.path.decay=0.9")
    config = load(None, ["data.train=x", "data.batch_size=8", "loss.D_steps=2", *path])
    turns = [at(config, 16 * (update + 1)).path for update in range(7)]
    assert {(p.weight, p.decay) for p in turns} == {(2.0, 0.9)}
    assert [p.factor for p in turns] == [3, 0, 0, 3, 0, 0, 3]
    assert [p.twice for p in turns] == [p.factor > 0 for p in turns]


def test_lazy_factors_average_to_one():
    for interval in (1, 2, 16):
        assert sum(lazy_factor(interval, update) for update in range(160)) == 160


def test_ema_half_life():
    assert ema_beta(10_000, 10, 0, 0) == 0.5
    assert ema_beta(64, 10, 0, 0) ** (10_000 / 64) == pytest.approx(0.5)
    assert ema_beta(64, 0, 0, 0) == 0.0 and ema_beta(0, 10, 0, 0) == 1.0


def test_ema_half_life_is_at_most_a_share_of_the_images_shown():
    """Closed form: 2^(−images / min(kimg·1000, rampup·cur_nimg)); nothing is kept before the first image."""
    assert ema_beta(64, 10, 0.05, 0) == 0.0
    assert ema_beta(64, 10, 0.05, 64) == pytest.approx(2 ** (-64 / 3.2), rel=1e-12)
    assert ema_beta(64, 10, 0.05, 1280) == pytest.approx(0.5, rel=1e-12)
    assert ema_beta(64, 10, 0.05, 100_000) == pytest.approx(2 ** (-64 / 5_000), rel=1e-12)
    assert ema_beta(64, 10, 0.05, 200_000) == ema_beta(64, 10, 0.05, 10**9) == ema_beta(64, 10, 0, 64)
    assert ema_beta(64, 0, 0.05, 10**6) == 0.0
    assert ema_beta(64, 10, 1e-300, 1) == 0.0
