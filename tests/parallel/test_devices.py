"""Players are on the launcher's device, and wait for it only where they must."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pipeline.config import Optimizer, WeightPenalty
from pipeline.gan.schedules import Rates
from pipeline.parallel.batch import BatchShape
from pipeline.parallel.engine import PlayerSettings
from pipeline.parallel.fsdp2 import Fsdp2Engine
from pipeline.parallel.watch.whereabouts import Progress
from pipeline.parallel.zero import ZeroEngine

CPU = torch.device("cpu")


@pytest.fixture
def alone():
    """A world of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield SimpleNamespace(
        rank=0,
        world=1,
        shards=1,
        device=CPU,
        precision="no",
        low_precision=None,
        keep_gathered=False,
        progress=Progress(),
        sum=lambda values: values,
    )
    dist.destroy_process_group()


def test_fsdp2_shards_over_the_launchers_kind_of_device_not_the_one_torch_was_built_for(alone, monkeypatch):
    """A build for CUDA on a machine without GPUs, or with ACCELERATE_USE_CPU=1 on one that has some."""
    monkeypatch.setattr(torch._C, "_get_accelerator", lambda *_: torch.device("cuda"))
    network = nn.Sequential(nn.Linear(3, 4), nn.SiLU(), nn.Linear(4, 1))
    player = PlayerSettings("D", Optimizer(), WeightPenalty(l2=1e-3), {"0.weight": 1.0})
    engine = Fsdp2Engine(network, player, alone, BatchShape(1, 1, 2))
    assert {p.device_mesh.device_type for p in network.parameters()} == {"cpu"}
    before = [f.data.clone() for f in engine.fragments]
    engine.backward(engine(torch.ones(2, 3)).sum())
    engine.step(Rates(2e-4, (0.5, 0.999), l2=0.0, l1=0.0))
    assert not any(torch.equal(f.data, b) for f, b in zip(engine.fragments, before, strict=True))


@pytest.mark.parametrize(("stage", "device", "waits"), [(3, "cuda", 1), (2, "cuda", 0), (3, "cpu", 0)])
def test_stage_3_gathers_no_weights_before_they_are_written(monkeypatch, stage, device, waits):
    waited = []
    stream = SimpleNamespace(synchronize=lambda: waited.append(1))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    ZeroEngine._masters_written(
        SimpleNamespace(_stage=stage, ranks=SimpleNamespace(device=torch.device(device)))
    )
    assert len(waited) == waits
