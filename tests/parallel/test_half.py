"""fp16 under every strategy: its loss scale changes nothing but what overflows."""

from __future__ import annotations

import json

import half
import pytest
import torch
from launches import LAUNCHED
from safetensors.torch import load_file

from launch import selfcheck
from launch.selfcheck import parity
from pipeline.parallel.loss_scale import START, LossScale

CASES = {case.name: case for case in parity.cases()}


@pytest.mark.parametrize("case", half.CASES)
@pytest.mark.parametrize("name", LAUNCHED)
def test_scaling_changes_nothing(launched, name, case):
    """Penalties, clipping and norms are in true units: over fp32 networks all is as without a loss scale."""
    found = selfcheck.differences(
        selfcheck.read(launched(name) / "scaled", case), selfcheck.expected(CASES[case])
    )
    assert [(what, error) for column, what, error in found if error > selfcheck.tolerance(column)] == []


@pytest.mark.parametrize("case", half.CASES)
@pytest.mark.parametrize("name", LAUNCHED)
def test_fp16_trains_as_fp32_does_to_its_own_rounding(launched, name, case):
    weights = load_file(launched(name) / "fp16" / f"{case}.safetensors")
    expected, _ = selfcheck.expected(CASES[case])
    for key, tensor in expected.items():
        errors = (weights[key] - tensor).abs().flatten()
        # Adam divides a gradient by its own size: one that rounding outweighs may step the other way.
        most = 1 + len(errors) // 1000 if case.startswith("adam") else 0
        assert (errors <= 2e-4).sum() >= len(errors) - most, key
        assert torch.equal(weights[f"resumed/{key}"], weights[key]), key


@pytest.mark.parametrize("name", LAUNCHED)
def test_an_overflow_on_one_rank_skips_the_update_on_all_and_halves_the_scale(launched, name):
    first, second, third = json.loads((launched(name) / "overflow.json").read_text())
    everything = ["D", "G", "G_ema"]
    assert (first["changed"], first["scale"]) == (everything, START)
    assert (second["changed"], second["scale"]) == (["G", "G_ema"], START / 2)
    assert (third["changed"], third["scale"]) == (everything, START / 2)
    assert second["norm"] == pytest.approx(first["norm"])  # no infinity in the charts
    assert third["norm"] != first["norm"]


def test_the_scale_is_doubled_after_a_long_time_without_overflow_and_survives_a_checkpoint():
    scale, fine, overflown = LossScale(torch.device("cpu")), torch.tensor(4.0), torch.tensor(torch.inf)
    no, yes = torch.tensor(0.0), torch.tensor(1.0)
    for _ in range(1999):
        scale.update(fine, no)
    resumed = LossScale(torch.device("cpu"))
    resumed.load(scale.state())
    resumed.update(fine, no)
    assert resumed.state()["loss_scale"] == 2 * START
    assert float(resumed.up(torch.tensor(3.0))) == 6 * START
    assert resumed.update(overflown, yes) == 4.0  # no infinity in the charts
    assert resumed.state() == {"loss_scale": START, "loss_scale_finite": 0, "loss_scale_squares": 4.0}
    again = LossScale(torch.device("cpu"))
    again.load(resumed.state())
    assert again.update(overflown, yes) == 4.0  # nor after a resume
    for _ in range(17):
        resumed.update(overflown, yes)
    assert resumed.state()["loss_scale"] == 1.0
    assert resumed.update(overflown, yes) == torch.inf  # which no smaller scale can help
    assert resumed.state()["loss_scale_squares"].isfinite()  # or it could not be saved
