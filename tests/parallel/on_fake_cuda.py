"""Training steps on a GPU that is not there: `LD_PRELOAD=fake_cuda.so python -m on_fake_cuda OUT`.

Tensors have shapes and a device but no memory. Writes to OUT, as JSON: for each case the operations of one
update on the device, ours and those of the bare maths (launch/bench/rivals.py), and the places in ours where
the host waits for the device; and the same, or the error, for each planted mistake.
"""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from launch.bench.rivals import BareMaths
from launch.doctor.memory import convert_without_memory
from pipeline import config
from pipeline.config import Config
from pipeline.data.stream import Batch
from pipeline.parallel.batch import batch_shape
from pipeline.parallel.engine import Contribution
from pipeline.parallel.watch.whereabouts import Progress
from pipeline.players import build
from pipeline.run.stats import Stats
from pipeline.step import train_step

GPU = torch.device("cuda:0")
LOW = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
SPREAD = 32  # updates of which statistics are added up in one go


@dataclass(frozen=True)
class Case:
    """What is trained, besides DCGAN at 64 px and L2."""

    precision: str = "no"
    settings: tuple[str, ...] = ()
    strategy: str = "single"  # or fsdp2, on two ranks
    classes: int = 0
    keep_gathered: bool = False

    @property
    def config(self) -> Config:
        common = ("data.train=none", "data.size=64", "data.batch_size=64", "penalty.l2=1e-4")
        return config.load(None, (*common, *self.settings))


_NO_NORM = ("G.norm=none", "D.norm=none")
_SYNC_BATCH = ("G.norm=sync_batch", "D.norm=sync_batch")
_ALL_ON = (
    "augment.ops=[flip,shift,scale,rotate,colour,cutout]", "augment.p=0.5",
    "data.batch_gpu=16", "loss.D_steps=2", "penalty.l1=1e-5", "penalty.r1.gamma=1", "penalty.r1.interval=1",
    *(f"{player}.{key}" for player in "GD" for key in ("dropout=0.1", "spectral_norm=true")),
    *(f"optim.{player}.clip=1" for player in "GD"),
)  # fmt: skip
_PATH = (
    "G.kind=launch.selfcheck.networks:LatentGenerator", "G.options.norm=none",
    "penalty.path.weight=1", "penalty.path.interval=1", "data.batch_gpu=32",
)  # fmt: skip
COMPARED = {
    "fp32, batch norm": Case(),
    "fp32, no norm": Case(settings=_NO_NORM),
    "bf16, batch norm": Case("bf16"),
    "bf16, no norm": Case("bf16", _NO_NORM),
    "fsdp2, fp32, batch norm": Case(strategy="fsdp2"),
    "fsdp2, bf16, no norm": Case("bf16", _NO_NORM, "fsdp2", keep_gathered=True),
}
_OBJECTIVE = (
    *_NO_NORM, "data.conditional=true", "data.batch_gpu=16", "data.batch_size=32", "loss.kind=relativistic",
    _ALL_ON[0], _ALL_ON[1], "penalty.wgan_gp.weight=1",
    *(f"penalty.{name}.{key}" for name in ("r1", "r2") for key in ("gamma=1", "interval=1")),
)  # fmt: skip
_QUARTER = ("penalty.r1.fraction=1/4", "penalty.r2.fraction=1/4")
OTHERS = {
    "fp32, all on": Case("no", (*_ALL_ON, "data.batch_size=32"), classes=10),
    "fp16, all on": Case("fp16", (*_ALL_ON, "data.batch_size=32", "loss.D_steps=1"), classes=10),
    "bf16, path length": Case("bf16", (*_NO_NORM, *_PATH)),
    "fsdp2, bf16, all on": Case("bf16", (*_ALL_ON, *_SYNC_BATCH, "loss.D_steps=1"), "fsdp2", classes=10),
    "fp32, objective": Case("no", _OBJECTIVE, classes=10),
    "bf16, finite difference": Case("bf16", (*_OBJECTIVE, "penalty.r1.sigma=0.1"), classes=10),
    "fsdp2, bf16, on a quarter": Case("bf16", (*_OBJECTIVE, *_QUARTER), "fsdp2", classes=10),
}
_NO_LAUNCH = ("aten::empty", "aten::new_empty", "aten::detach", "aten::_unsafe_view", "aten::lift_fresh")


def _read(images: Tensor) -> Tensor:
    return images * images.sum().item()


MISTAKES: dict[str, Callable[[Tensor], Tensor]] = {  # made with every image that D sees
    "a value that is read": _read,
    "a tensor on the CPU": lambda images: images + torch.zeros(images.shape),
    "a copy that blocks": lambda images: images + torch.zeros(images.shape).to(GPU),
    "more operations": lambda images: images.mul(2).div(2).mul(2).div(2).mul(2).div(2),
}


class Device(TorchDispatchMode):
    """Counts operations on the device, and records where the host waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.gathers = 0
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name == "aten::_local_scalar_dense":
            self.waits.append(_where(name))  # and then fails, as there is no value without memory
        out = func(*args, **(kwargs or {}))
        given, made = ([t for t in tree_leaves(x) if torch.is_tensor(t)] for x in ((args, kwargs), out))
        self.gathers += name == "c10d::_allgather_base_"
        if func.namespace == "aten" and any(t.is_cuda for t in (*given, *made)):
            if not func.is_view and not name.startswith(_NO_LAUNCH):
                self.launches[name] += 1
            if name.startswith(("aten::_to_copy", "aten::copy_")) and made[0].is_cuda != given[-1].is_cuda:
                patient = (kwargs or {}).get("non_blocking") or args[2:3] == (True,)
                self.waits += [] if patient and not given[-1].is_cuda else [_where(name)]
        return out


def _where(name: str) -> str:
    ours = [f for f in traceback.extract_stack() if "/pipeline/" in f.filename]
    return f"{name} at {Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else name


def main(out: Path) -> None:
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    found: dict[str, Any] = {}
    for name, case in (COMPARED | OTHERS).items():
        with pretending():
            found[name] = training(case)
            if name in COMPARED:
                found[name]["bare"] = bare_maths(case)
    for mistake, made in MISTAKES.items():
        with pretending():
            try:
                found[mistake] = training(COMPARED["fp32, no norm"], made)
            except Exception as error:
                found[mistake] = {"error": f"{type(error).__name__}: {error}"}
    out.write_text(json.dumps(found))


@contextlib.contextmanager
def pretending() -> Iterator[None]:
    """Tensors without memory; and whatever a step asks of Python's side of torch.cuda, which knows that there
    is no GPU."""
    with (
        FakeTensorMode(),
        patch.multiple(
            torch.cuda,
            Event=Mock,
            Stream=_Stream,
            stream=contextlib.nullcontext,
            current_stream=_Stream,
            current_device=lambda: 0,
            default_generators=(torch.Generator(),),
            is_bf16_supported=lambda *_, **__: True,
            _lazy_init=lambda: None,
        ),
        patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        patch.object(FakeTensorMode, "avoid_device_init", True),
        patch.object(nn.Module, "_apply", convert_without_memory),
        patch.object(DeviceMesh, "from_group", _mesh),
    ):
        yield


class _Stream:
    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_event(self, _: Any) -> None: ...

    wait_stream = wait_event

    def record_event(self, _: Any = None) -> Any:
        return Mock()


_from_group = DeviceMesh.from_group


def _mesh(*args: Any) -> DeviceMesh:
    with unset_fake_temporarily():  # its table of ranks has values
        return _from_group(*args)


class Reported(Stats):
    """Remembers what is reported."""

    def __init__(self) -> None:
        super().__init__(GPU)
        self.reports: list[Mapping[str, Contribution]] = []

    def add(self, shares: Mapping[str, Contribution]) -> None:
        super().add(shares)
        self.reports.append(shares)


def training(case: Case, augment: Callable[[Tensor], Tensor] | None = None) -> dict[str, Any]:
    """The second update of a training, with its part in the work of adding up statistics."""
    options, world = case.config, 2 if case.strategy == "fsdp2" else 1

    def all_reduce(values: Tensor) -> Tensor:
        dist.all_reduce(values)
        return values

    ranks: Any = SimpleNamespace(
        rank=0, world=world, main=True, strategy=case.strategy, device=GPU, precision=case.precision,
        low_precision=LOW[case.precision], keep_gathered=case.keep_gathered, progress=Progress(),
        compilation=None, shards=world, sum=all_reduce if world > 1 else lambda values: values,
    )  # fmt: skip
    gan = build(options, ranks, batch_shape(options.data, world), [1.0] * case.classes or None)
    gan = replace(gan, augment=(lambda images, _: augment(images)) if augment else gan.augment)
    local = options.data.batch_size // world
    labels = torch.zeros(local, dtype=torch.int64) if case.classes else None
    batch = Batch(torch.zeros(local, options.data.channels, 64, 64, dtype=torch.uint8), labels)
    stats = Reported()
    cur_nimg = train_step(gan, iter([batch] * 2), 0, stats)
    stats.reports.clear()
    with Device() as device:
        train_step(gan, iter([batch] * 2), cur_nimg, stats)
    again = Stats(GPU)
    for shares in stats.reports * (2 * SPREAD):
        again.add(shares)
    with Device() as adding:
        for shares in stats.reports * SPREAD:
            again.add(shares)
    return {
        "ours": sum(device.launches.values()) + sum(adding.launches.values()) / SPREAD,
        "gathers": device.gathers,
        "waits": device.waits + adding.waits,
    }


def bare_maths(case: Case) -> int:
    """The second update of the same maths and nothing else."""
    options = case.config
    bare = BareMaths(options, GPU, case.precision == "bf16")
    real = torch.zeros(64, options.data.channels, 64, 64, device=GPU).to(memory_format=torch.channels_last)
    z = torch.zeros(64, options.G.z_dim, device=GPU)
    bare.update(real, z, z)
    with Device() as device:
        bare.update(real, z, z)
    return sum(device.launches.values())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
