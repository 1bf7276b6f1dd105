"""What an update depends on besides weights and data is a function of the images shown."""

import pytest

from pipeline.config import load
from pipeline.gan.schedules import Rates, at, charts, ema_beta, half_life, lazy_factor, scheduled


def test_rates_are_the_configs_at_any_time():
    config = load(None, ["data.train=x", "optim.D.lr=3e-4", "optim.G.betas=[0.0,0.99]"])
    for cur_nimg in (0, 64, 10**9):
        now = at(config, cur_nimg)
        assert Rates(3e-4, (0.5, 0.999), l2=0.0, l1=0.0) == now.D
        assert Rates(2e-4, (0.0, 0.99), l2=0.0, l1=0.0) == now.G
        assert now == at(config, cur_nimg)


def test_the_average_goes_by_the_images_of_a_whole_update():
    config = load(None, ["data.train=x", "loss.D_steps=2", "ema.kimg=10", "ema.rampup=0.05"])
    assert at(config, 64_000).ema_beta == ema_beta(128, half_life=3_200)


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
    assert ema_beta(10_000, 10_000) == 0.5
    assert ema_beta(64, 10_000) ** (10_000 / 64) == pytest.approx(0.5)
    assert ema_beta(64, 0) == 0.0 and ema_beta(0, 10) == 1.0


def test_ema_half_life_is_at_most_a_share_of_the_images_shown():
    """min(kimg·1000, rampup·cur_nimg); nothing is kept before the first image."""

    def after(cur_nimg, kimg=10, rampup=0.05):
        return half_life(load(None, ["data.train=x", f"ema.kimg={kimg}", f"ema.rampup={rampup}"]), cur_nimg)

    assert [after(n) for n in (0, 64, 1280)] == [0.0, pytest.approx(3.2), 64.0]
    assert after(200_000) == after(10**9) == after(64, rampup=0) == 10_000
    assert after(10**6, kimg=0) == 0.0 and ema_beta(64, after(1, rampup=1e-300)) == 0.0


# Schedules


SCHEDULED = (
    "data.train=x", "data.batch_size=10", "run.burn_in_kimg=20", "optim.G.lr=[2e-4,5e-5]",
    "optim.D.betas=[0.0,[0.9,0.99]]", "penalty.r1.gamma=[0.05,0.005]", "penalty.r2.gamma=[0,1]",
    "penalty.D.l2=[1e-3,0]", "penalty.G.l1=[0,1e-4]", "augment.ops=[flip]", "augment.p=[0,0.55]",
    "ema.kimg=[0,5]",
)  # fmt: skip


def test_a_schedule_is_half_a_cosine():
    """At 0, N/2 and N, and at N/4 by its closed form; afterwards it stays, to the last bit."""
    found = [scheduled((2e-4, 5e-5), n, burn_in_kimg=20) for n in (0, 10_000, 20_000)]
    assert found == [2e-4, pytest.approx(1.25e-4, rel=1e-12), 5e-5]
    assert scheduled((2e-4, 5e-5), 5_000, 20) == pytest.approx(5e-5 + 1.5e-4 * (2 + 2**0.5) / 4, rel=1e-12)
    assert scheduled((2e-4, 5e-5), 20_001, 20) == scheduled((2e-4, 5e-5), 10**9, 20) == 5e-5
    assert scheduled(0.3, 7, 0) == 0.3


def test_everything_follows_the_one_cosine():
    config = load(None, SCHEDULED)
    for cur_nimg, share in ((0, 1.0), (10_000, 0.5), (20_000, 0.0), (30_000, 0.0)):  # of `from`
        now = at(config, cur_nimg)

        def between(start, end, share=share):
            return pytest.approx(share * start + (1 - share) * end, rel=1e-12)

        assert (now.G.lr, now.G.betas, now.D.lr) == (between(2e-4, 5e-5), (0.5, 0.999), 2e-4)
        assert now.D.betas == (0.0, between(0.9, 0.99))
        assert (now.D.l2, now.D.l1, now.G.l2, now.G.l1) == (between(1e-3, 0), 0, 0, between(0, 1e-4))
        assert [p.gamma for p in now.gradient_penalties] == [between(0.05, 0.005), between(0, 1)]
        assert now.augment_p == between(0, 0.55)
        assert half_life(config, cur_nimg) == between(0, 5_000)  # without a ramp-up
    assert at(config, 0).ema_beta == 0.0 and at(config, 20_000).ema_beta == ema_beta(10, 5_000)


def test_charts_show_what_is_used():
    assert charts(load(None, ["data.train=x", "optim.G.kind=sgd", "ema.kimg=0"]), 0, augment_p=0.0) == {
        "Progress/G/lr": 2e-4, "Progress/D/lr": 2e-4, "Progress/D/beta2": 0.999
    }  # fmt: skip
    assert charts(load(None, SCHEDULED), 20_000, augment_p=0.55) == {
        "Progress/G/lr": 5e-5, "Progress/G/beta2": 0.999, "Progress/G/l1": 1e-4,
        "Progress/D/lr": 2e-4, "Progress/D/beta2": 0.99, "Progress/D/l2": 0.0,
        "Progress/r1_gamma": 0.005, "Progress/r2_gamma": 1.0, "Progress/ema_kimg": 5.0,
        "Progress/augment_p": 0.55,
    }  # fmt: skip
