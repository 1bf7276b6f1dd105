"""What stays in memory, and how long: the whole G_ema, FSDP2's gathered blocks, DeepSpeed's buckets."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.config import Optimizer, UserError, WeightPenalty
from pipeline.gan.schedules import Rates
from pipeline.parallel.batch import BatchShape
from pipeline.parallel.copying import whole_copy
from pipeline.parallel.ema import Ema
from pipeline.parallel.forward_timing import ForwardTimer
from pipeline.parallel.fragments import Fragment
from pipeline.parallel.fsdp2 import refuse_unshardable
from pipeline.parallel.launched import read_launch
from pipeline.parallel.order import Order, gathered_alone
from pipeline.parallel.weight_penalty import LocalPenalty
from pipeline.parallel.zero import refuse_single_numbers
from pipeline.parallel.zero_settings import deepspeed_config
from pipeline.run.health import FORWARD
from pipeline.run.session import _peak_memory_gb, of_this_rank


def test_whole_g_ema_is_in_memory_from_the_call_to_the_next_update():
    network, copy = nn.Linear(3, 2), nn.Linear(3, 2)
    fragments = [Fragment(n, 0, p.shape, p.detach(), True) for n, p in network.named_parameters()]
    engine = SimpleNamespace(
        fragments=fragments,
        module=network,
        ranks=SimpleNamespace(world=1),
        whole=lambda pieces: ((f.name, piece) for f, piece in zip(fragments, pieces, strict=True)),
    )
    ema = Ema(engine, copy)
    assert all(p.numel() == 0 for p in copy.parameters())
    x = torch.randn(4, 3)
    torch.testing.assert_close(ema.module()(x), network(x))
    with torch.no_grad():
        network.weight.add_(1)
    ema.update(0.5)
    assert all(p.numel() == 0 for p in copy.parameters())
    torch.testing.assert_close(ema.module().weight.data, network.weight.detach() - 0.5)


@pytest.mark.parametrize(("said", "kept"), [("true", False), ("false", True), (None, False)])
def test_the_launcher_says_whether_gathered_blocks_are_kept(said, kept):
    environment = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "WORLD_SIZE": "2", "RANK": "0"}
    if said is not None:
        environment["FSDP_RESHARD_AFTER_FORWARD"] = said
    assert read_launch(environment).keep_gathered is kept


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_buckets_are_no_larger_than_the_player_and_can_be_set(stage):
    def config(elements, **zero):
        given = {"zero_optimization": {"stage": stage, **zero}}
        return deepspeed_config(given, "no", Optimizer(), BatchShape(2, 1, 2), elements)["zero_optimization"]

    assert config(1000)["reduce_bucket_size"] == 1000
    assert config(10**9)["reduce_bucket_size"] < 10**8
    assert config(1000, reduce_bucket_size=5)["reduce_bucket_size"] == 5


def test_fsdp2_refuses_what_it_cannot_shard():
    """Sharded twice, it would be trained as two parameters."""
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    refuse_unshardable(module)
    module[1].weight = module[0].weight
    with pytest.raises(UserError, match=r"0\.weight and 1\.weight"):
        refuse_unshardable(module)
    module = nn.Sequential(nn.Linear(2, 2))
    module.scale = nn.Parameter(torch.ones(()))
    for refuse in (refuse_unshardable, refuse_single_numbers):
        with pytest.raises(
            UserError, match=r"parameter scale of Sequential is a single number.* shape \[1\]"
        ):
            refuse(module)


def test_forward_times_are_cleared_at_every_tick_by_a_single_rank_too():
    taken = []
    timer = SimpleNamespace(take=lambda: taken.append(1) or 0.5)
    player = SimpleNamespace(forward_timer=timer, copies=1, order=None)
    found = of_this_rank(SimpleNamespace(G=player, D=player), world=1)
    assert found == {FORWARD: 1.0} and len(taken) == 2


def test_the_order_of_layers_is_one_number():
    layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    order, x = Order(gathered_alone(layers)), torch.ones(1, 2)

    def ran(*numbers: int) -> float:
        for number in numbers:
            layers[number](x)
        return order.take()

    found = [ran(0, 1), ran(1, 0), ran(0), ran(0, 0), ran(0, 1, 2), ran(), ran(*range(3), *range(3))]
    assert len(set(found)) == len(found) and ran(0, 1) == found[0] and ran() == 0
    assert ran(*[2, 1] * 1000) < 2**48


class Device:
    """Passes of one second each; it is some passes behind the host."""

    def __init__(self, behind: int) -> None:
        self.recorded, self.made, self.behind = 0, 0, behind

    def event(self, enable_timing: bool) -> Any:
        assert enable_timing
        self.made += 1
        event = SimpleNamespace(at=0)

        def record() -> None:
            self.recorded += 1
            event.at = self.recorded

        event.record, event.query = record, lambda: event.at <= self.recorded - 2 * self.behind
        event.elapsed_time = lambda end: 1000.0 * (end.at - event.at)
        return event


@pytest.mark.parametrize("behind", [0, 3])
def test_forward_passes_are_timed_by_no_more_events_than_the_gpu_is_behind(monkeypatch, behind):
    """However long a tick is. Nothing here can wait for an event, nor is any recorded into a CUDA graph."""
    device = Device(behind)
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    timer = ForwardTimer(torch.device("cuda"))
    for passes in (1000, 10):
        for _ in range(passes):
            with timer.measured():
                pass
        assert timer.take() == passes
    assert device.made == 2 * (behind + 1)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with timer.measured():
        pass
    assert timer.take() == 0 and device.recorded == 2 * 1010


def test_all_penalties_are_where_the_weights_are():
    """Also an unused one; `meta` represents a device that is not the CPU."""
    values = LocalPenalty(WeightPenalty(l1=1e-3), [torch.empty(3, device="meta")]).sums()
    assert {value.device.type for value in values.values()} == {"meta"} and len(values) == 2


def test_a_rank_without_a_penalised_fragment_has_nothing_to_add():
    penalty = LocalPenalty(WeightPenalty(l2=1e-3, l1=1e-3), [])
    now = Rates(2e-4, (0.5, 0.999), l2=1e-3, l1=1e-3)
    penalty.add_gradient([], now)
    assert {float(value) for value in penalty.sums().values()} == {0.0}
    assert float(penalty.gradient(penalty.sums(), now)["penalty"]) == 0.0


def test_peak_memory_on_a_gpu_is_that_of_one_tick(monkeypatch):
    peaks = [3e9]
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: peaks[-1])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: peaks.append(1e9))
    gpu = torch.device("cuda:0")
    assert [_peak_memory_gb(gpu), _peak_memory_gb(gpu)] == [3.0, 1.0]


def test_a_copy_holds_nothing_of_its_network():
    """Also of what a module computes from its parameters and keeps."""
    network = nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(3, 2)), nn.BatchNorm1d(2)).eval()
    x = torch.randn(5, 3)
    before, copied = network(x), whole_copy(network)
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            tensor.zero_()
    assert torch.equal(copied(x), before) and not torch.equal(network(x), before)
