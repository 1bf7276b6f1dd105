"""Every strategy trains what plain torch trains: each case of the parity matrix, in worlds of 1 to 4."""

from __future__ import annotations

import pytest
import torch
from in_ranks import CONTINUED
from launches import EVERYWHERE, before, marks_of
from safetensors.torch import load_file

from launch import selfcheck
from launch.selfcheck import parity

CASES = {  # of each launch
    launch: {case.name: case for case in parity.cases(int(world), strategy, thorough=True)}
    for launch, strategy, world in ((launch, *launch.split("-")) for launch, _ in EVERYWHERE)
}
CELLS = [
    pytest.param(launch, name, marks=marks_of(launch, case))
    for launch, cases in CASES.items()
    for name, case in cases.items()
]
RESUMED = [cell for cell in CELLS if CASES[str(cell.values[0])][str(cell.values[1])].resumed]


@pytest.mark.parametrize(("name", "case"), CELLS)
def test_it_trains_what_plain_torch_trains(launched, name, case):
    trained = selfcheck.read(launched(name), case)
    assert {key.partition("/")[0] for key in trained[0]} - {"resumed"} == {"G", "D", "G_ema"}
    found = list(selfcheck.differences(trained, selfcheck.expected(CASES[name][case])))
    assert len(found) > 50
    slack = CASES[name][case].slack
    assert [
        f"{what}: {error:.1e}" for column, what, error in found if error > slack * selfcheck.tolerance(column)
    ] == []


@pytest.mark.parametrize(("name", "case"), RESUMED)
def test_it_goes_on_from_a_checkpoint_bit_for_bit(launched, name, case):
    weights, _ = selfcheck.read(launched(name), case)
    unbroken = {key: t for key, t in weights.items() if not key.startswith("resumed/")}
    assert len(weights) == 2 * len(unbroken)
    for key, tensor in unbroken.items():
        assert torch.equal(weights[f"resumed/{key}"], tensor), key


@pytest.mark.parametrize(
    ("name", "case"),
    [
        pytest.param(name, case, marks=marks_of(name, CASES[name][case]))
        for name, _ in EVERYWHERE
        if before(name) is not None
        for case in CONTINUED
    ],
)
def test_it_goes_on_from_a_checkpoint_of_another_strategy_or_world(launched, name, case):
    """The next updates after loading it end where the unbroken training does, to rounding."""
    continued = load_file(launched(name) / f"continued-{case}.safetensors")
    unbroken, _ = selfcheck.expected(CASES[name][case])
    assert continued.keys() == unbroken.keys()
    for key, tensor in unbroken.items():
        torch.testing.assert_close(
            continued[key], tensor, rtol=1e-6, atol=1e-6
        )  # StyleGAN2 stores weights of 100
