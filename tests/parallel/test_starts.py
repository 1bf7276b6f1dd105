"""run.init and D.freeze under every strategy: the same weights, averages and moments, whoever holds them."""

from __future__ import annotations

import json

import pytest
from launches import LAUNCHED


@pytest.mark.parametrize("name", LAUNCHED)
def test_it_starts_from_another_run_and_resumes_without_it(launched, name):
    found = json.loads((launched(name) / "starts.json").read_text())
    assert found["unlike"] == []
    frozen = {"D/blocks.0.conv.weight", "D/blocks.0.conv.bias"}  # and have no moments
    assert {key.partition("/")[2] if key.startswith("exp") else key for key in found["frozen"]} == frozen
    assert len(found["frozen"]) == 3 * len(frozen)
    assert found["at the start"] < 1e-6 and found["resumed"] < 1e-6
