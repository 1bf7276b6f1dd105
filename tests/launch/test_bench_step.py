"""`shardgan bench step`: the bare maths are the step's maths, and the table has everyone in it."""

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from launch.bench import bench, objective, step
from launch.bench.rivals import BareMaths
from launch.bench.step import Ours, _ignored_signals, _ratios
from pipeline.config import load
from pipeline.gan.images import to_float
from pipeline.parallel.compilation import Compilation

SHARDS = Path(__file__).parents[1] / "assets" / "fashion-mnist-500"


@pytest.fixture(autouse=True)
def untracked(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")


def test_the_bare_maths_are_those_of_the_step(tmp_path):
    """Without penalties and ramp-up, on the same images and latents, both end at the same parameters."""
    keys = [
        "data.size=28",
        "data.channels=1",
        "data.batch_size=8",
        "data.workers=0",
        "run.name=bench",
        "ema.rampup=0",
    ]
    settings = load(None, [f"data.train={SHARDS}", *keys, "G.width=4", "D.width=4", "G.z_dim=8"])
    ours = Ours(settings, tmp_path / "ours", "no", _ignored_signals())
    bare = BareMaths(settings, torch.device("cpu"), bf16=False)
    reals = ours.some_images(5 * 8).split(8)
    gan = ours._gan
    for number, real in enumerate(reals):
        before = number * 8
        z = gan.draw("D", before).z, gan.draw("G", before + 8).z
        bare.update(to_float(real), *z)
    ours.run(len(reals))
    ours.close()
    start = BareMaths(settings, torch.device("cpu"), bf16=False)
    for engine, module, untrained in ((gan.G, bare.G, start.G), (gan.D, bare.D, start.D)):
        for (name, p), q, r in zip(
            engine.module.named_parameters(), module.parameters(), untrained.parameters(), strict=True
        ):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
            assert (q - r).abs().max() > 1e-4, name
    for average, q in zip(gan.G_ema.averages, bare.G_ema.parameters(), strict=True):
        torch.testing.assert_close(average, q, rtol=0, atol=1e-6)


def test_the_command_prints_everyone(monkeypatch):
    """Compiled without a compiler."""
    monkeypatch.setattr(step, "Compilation", lambda _: Compilation("eager"))
    options = ["--size", "28", "--width", "4", "--batch", "8", "--steps", "1", "--workers", "0"]
    result = CliRunner().invoke(bench, ["step", *options, "--compile"], catch_exceptions=False)
    assert result.exit_code == 0
    for name in ("shardgan", "bare maths", "tutorial"):
        assert f"{name} fp32" in result.output
    assert "compiled bf16" in result.output and " times as fast, in fp32." in result.output
    assert "shardgan bf16" in result.output and "bare maths bf16" in result.output
    assert "1 turns of 8 updates" in result.output
    for name in objective.OBJECTIVES:
        assert f"{name}, fp32" in result.output and f"{name}, bf16" in result.output


def test_each_objective_is_measured_as_it_says(monkeypatch):
    """In one turn of D: whose passes are differentiated twice, and what is charted."""
    seen = []
    monkeypatch.setattr(objective, "update_D", lambda gan, *_: seen.append(gan.at(0).gradient_penalties))
    config = load(None, ["data.train=none", "data.size=28", "data.batch_size=4", "G.width=2", "D.width=2"])
    found = objective.measure(config, "no", turns=1)
    assert {len(taken) for taken in found.values()} == {1}
    of_one_turn = [{(p.name, p.twice, p.every) for p in each} for each in seen[-len(found) :]]
    assert of_one_turn == [
        set(),
        {("r1", True, 1), ("r2", True, 1)},
        {("r1", True, 4), ("r2", True, 4)},
        {("r1", False, 1), ("r2", False, 1)},
        {("r1", False, 4), ("r2", False, 4)},
    ]


def test_ratios_of_turns_ignore_what_slows_a_whole_turn():
    ours, theirs = [1.1, 11.0, 1.1], [1.0, 10.0, 1.0]
    assert _ratios(ours, theirs) == (pytest.approx(1.1), pytest.approx(1.1))
