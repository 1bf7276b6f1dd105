"""FSDP2 gathers block by block where the launcher's file says so, and keeps what it has gathered if not."""

from __future__ import annotations

import json

import pytest
from launches import launched_in


@pytest.mark.parametrize("name", launched_in(1, 2, 3, 4, strategies=("fsdp2", "hsdp")))
def test_no_rank_holds_more_than_a_block_if_blocks_are_gathered_for_every_pass(launched, name):
    found = json.loads((launched(name) / "gathered.json").read_text())
    for player in "GD":
        kept, by_block = found["kept"][player], found["by block"][player]
        assert kept["most"] == kept["all"]
        assert by_block["most"] == by_block["by_block"] < by_block["all"] / 3
