"""Players are on the launcher's device, and wait for it only where they must."""

from __future__ import annotations

import gc
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader

from pipeline.borrowed import borrowed
from pipeline.config import Data, Optimizer, WeightPenalty
from pipeline.data import workers
from pipeline.errors import UserError
from pipeline.gan.schedules import Rates
from pipeline.parallel.batch import BatchShape
from pipeline.parallel.engine import Engine, PlayerSettings
from pipeline.parallel.fsdp2 import Fsdp2Engine
from pipeline.parallel.gpus import gpus, on_gpu
from pipeline.parallel.launched import arithmetic, emulated, read_launch
from pipeline.parallel.ranks import Ranks
from pipeline.parallel.watch.whereabouts import Progress
from pipeline.parallel.zero import ZeroEngine
from pipeline.run import reals

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


@pytest.mark.parametrize(
    ("precision", "device", "supported", "convolutions", "override", "tf32"),
    [
        ("no", "cuda", True, "tf32", None, True),
        ("no", "cuda", True, "tf32", "0", False),
        ("no", "cuda", True, "ieee", None, False),
        ("no", "cuda", False, "tf32", None, False),  # before Ampere
        ("no", "cpu", True, "tf32", None, False),
        ("bf16", "cuda", True, "tf32", None, False),
    ],
)
def test_a_run_says_where_float32_is_not(
    monkeypatch, precision, device, supported, convolutions, override, tf32
):
    monkeypatch.setattr(torch.cuda, "is_tf32_supported", lambda: supported)
    monkeypatch.setattr(torch.backends.cudnn, "conv", SimpleNamespace(fp32_precision=convolutions))
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    if override is not None:
        monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", override)
    said = arithmetic(precision, torch.device(device))
    assert said.startswith(precision) and ("TF32" in said) is tf32


@pytest.mark.parametrize(
    ("precision", "device", "has", "said"),
    [
        ("bf16", "cpu", {"avx2": True, "avx512_bf16": False}, True),
        ("bf16", "cpu", {"avx2": True, "avx512_bf16": True}, False),
        ("bf16", "cpu", {"neon": True, "bf16": True}, False),
        ("fp16", "cpu", {"avx512_bf16": True}, True),
        ("no", "cpu", {}, False),
        ("fp16", "cuda", {}, False),
    ],
)
def test_a_run_says_that_its_precision_is_slow_on_this_cpu(monkeypatch, precision, device, has, said):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    text = emulated(precision, torch.device(device))
    assert bool(text) is said and (not said or text.startswith(f"{precision} is slow on this CPU"))


@pytest.mark.parametrize(("native", "said"), [(False, True), (True, False)])
def test_a_run_says_that_its_precision_is_slow_on_this_gpu(monkeypatch, native, said):
    """Before Ampere; what torch calls supported includes that it emulates."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native)
    assert ("--mixed_precision fp16" in emulated("bf16", torch.device("cuda"))) is said


def test_gpus_that_torch_counts_but_cannot_use_are_refused(monkeypatch, gpus_here):
    """As with an old driver, which would quietly be a training on CPUs."""
    gpus_here(2)
    assert gpus() == 2 and on_gpu()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"cannot use this machine's GPUs \(2\).*driver is too old"):
        on_gpu()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    assert gpus() == 0 and not on_gpu()


def test_a_callers_settings_of_cudnn_are_theirs_again(monkeypatch, alone):
    """Training needs kernels that are the same every time, which cuDNN does not choose by their speed."""
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "benchmark", True)
    monkeypatch.setattr(cudnn, "deterministic", False)
    with borrowed():
        Ranks(read_launch({}), timedelta(seconds=10))
        assert (cudnn.benchmark, cudnn.deterministic) == (False, True)
    assert (cudnn.benchmark, cudnn.deterministic) == (True, False)


def test_a_callers_gpu_is_free_again(monkeypatch):
    """For the processes that train next; once cycles, which hold tensors, are collected."""
    collected: list[str] = []
    for module, name in ((gc, "collect"), (torch.cuda, "empty_cache")):
        monkeypatch.setattr(module, name, lambda name=name: collected.append(name))
    with borrowed():
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)  # by the training
    assert collected == ["collect", "empty_cache"]


@pytest.mark.parametrize(("world", "copies"), [(1, 1), (2, 2)])
def test_whole_weights_are_on_the_device_where_their_parts_are_offloaded(world, copies):
    """meta stands for a GPU."""
    ranks = SimpleNamespace(world=world, device=torch.device("meta"))
    fragment = SimpleNamespace(name="w", shape=torch.Size([2, 3]), start=0)
    engine = SimpleNamespace(ranks=ranks, copies=copies, fragments=[fragment])
    ((name, whole),) = Engine.whole(engine, [torch.zeros(6)])
    assert (name, whole.shape, whole.device.type) == ("w", (2, 3), "meta")


@pytest.mark.parametrize(("device", "pinned"), [("cuda", True), ("cpu", False)])
def test_batches_are_pinned_where_the_ranks_compute_on_a_gpu(monkeypatch, device, pinned):
    """Not because the machine has one, as with ACCELERATE_USE_CPU=1: that would make a CUDA context."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked = []

    def loader(*given, pin_memory, **settings):
        asked.append(pin_memory)
        return DataLoader(*given, **settings)

    monkeypatch.setattr(workers, "DataLoader", loader)
    monkeypatch.setattr(
        reals, "training_batches", lambda *_, pinned, **__: workers.Loader([], 0, pinned=pinned)
    )
    split = SimpleNamespace(training=lambda: None)
    ranks = SimpleNamespace(rank=0, device=torch.device(device))
    settings = SimpleNamespace(data=Data())
    reals.open_reals(settings, None, split, SimpleNamespace(cur_nimg=0), ranks, BatchShape(1, 1, 2), None)
    assert asked == [pinned]
