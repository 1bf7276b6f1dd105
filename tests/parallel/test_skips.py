"""An update that one rank must skip is skipped by all, and leaves no trace on any."""

from __future__ import annotations

import json

import pytest
import skips
import torch
from launches import LAUNCHED
from torch import nn

from pipeline.parallel.buffers import Buffers, BufferSnapshot


@pytest.mark.parametrize("case", skips.CASES)
@pytest.mark.parametrize("name", LAUNCHED)
def test_a_skipped_update_changes_nothing_and_the_next_is_as_without_it(launched, name, case):
    """Weights, running statistics, u and v of spectral norm, G_ema, moving means; after it moments too. The
    very first updates are among those skipped, when momentum has not been written to."""
    changed = json.loads((launched(name) / "skips.json").read_text())[case]
    assert changed.keys() == {*skips.TRIES, "after"}
    assert {kind: names for kind, names in changed.items() if names} == {}


@pytest.mark.parametrize("name", LAUNCHED)
def test_a_layer_that_takes_no_part_in_an_update_stays(launched, name):
    """DeepSpeed's stage 3 would apply its last gradient again; DDP would wait for one, and is refused."""
    found = json.loads((launched(name) / "idle.json").read_text())
    if name in ("ddp-2", "ddp-3"):
        start, moved, later = found
        assert start.startswith(
            "G: what Sometimes returns does not depend on its parameter last.weight and 1 more"
        )
        assert moved is True  # in the update that it took part in
        assert later.startswith("G: what Sometimes returned in this update did not depend on all of its")
        assert all("--strategy fsdp2" in message for message in (start, later))
    else:
        assert found == [True, False, False]


@pytest.mark.parametrize("name", LAUNCHED)
def test_collectives_of_every_library_wait_as_long_as_ours(launched, name):
    settled = json.loads((launched(name) / "settled.json").read_text())
    strategy, world = name.split("-")
    assert len(settled["timeouts"]) >= (2 if strategy.startswith("zero") else int(world) > 1)
    assert set(settled["timeouts"]) <= {120}  # what launch.selfcheck.parity asks for
    assert settled["timer"] is False
    assert settled["nccl"] == {
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "2",
        "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "480",
    }


def test_buffers_of_all_types_are_restored_on_a_skip_and_replaced_ones_are_left_alone():
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))
    network.register_buffer("cache", torch.zeros(2, dtype=torch.int32))
    network.register_buffer("none", None)
    network.register_buffer("image", torch.zeros(1, 2, 3, 3).to(memory_format=torch.channels_last))
    network.register_buffer("constant", torch.ones(2, dtype=torch.bool))  # the only one of its type
    buffers = Buffers(network, torch.device("cpu"))
    before = {name: b.clone() for name, b in network.named_buffers()}
    for skipped in (True, False):
        kept = BufferSnapshot(buffers)
        network(torch.full((2, 3, 4, 4), torch.inf))
        network.image.add_(torch.arange(18.0).view(1, 2, 3, 3))
        network.cache = torch.ones(3, dtype=torch.int32)  # another tensor in its place
        network[0].running_var = network[0].running_var * 2  # likewise, of the same size
        spoilt = {name: b.clone() for name, b in network.named_buffers()}
        kept.restore(unless=torch.tensor(not skipped))
        after = dict(network.named_buffers())
        for name in before.keys() - {"cache"}:
            torch.testing.assert_close(
                after[name], (before if skipped else spoilt)[name], rtol=0, atol=0, equal_nan=True
            )
        assert torch.equal(after["cache"], spoilt["cache"])
