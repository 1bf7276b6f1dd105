"""One rank of each machine looks at the shards, whatever the number of ranks; all train on the same ones."""

from __future__ import annotations

import json

import pytest
from launches import LAUNCHED, launched_in
from machines import PER_MACHINE


@pytest.mark.parametrize("name", LAUNCHED)
def test_one_rank_of_each_machine_looks_at_the_shards(launched, name):
    found, world = json.loads((launched(name) / "machines.json").read_text()), int(name[-1])
    assert found["looked"] == [int(rank % PER_MACHINE == 0) for rank in range(world)]
    assert found["same"] == [3] * world


@pytest.mark.parametrize("name", launched_in(3))
def test_machines_that_see_other_data_are_refused_by_all_ranks(launched, name):
    found = json.loads((launched(name) / "machines.json").read_text())
    differ = "OUT/shards is not the same data on all machines of this run: their indices differ."
    assert found["other"] == [differ, differ, differ.replace("shards", "other")]
    assert len(set(found["absent"])) == 1
    assert found["absent"][0].startswith("rank 2: There are no shards at OUT/absent")


@pytest.mark.parametrize("name", LAUNCHED)
def test_ranks_with_one_error_are_named_together(launched, name):
    found, world = json.loads((launched(name) / "machines.json").read_text()), int(name[-1])
    expected = {1: "", 2: "rank 1: no disk"}.get(world, f"ranks 1 to {world - 1}: no disk")
    assert found["failed"] == [expected] * world
