"""One training step on a GPU that is not there: `LD_PRELOAD=fake_cuda.so python -m on_fake_cuda OUT`.

Tensors have shapes and a device but no memory. Writes to OUT, as JSON, for each case the operations of one
update on the device, ours and those of the bare maths (launch/bench/rivals.py), and the places in ours at
which the host would wait for the device.
"""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from launch.bench.rivals import BareMaths
from launch.doctor.memory import convert_without_memory
from pipeline import config
from pipeline.config import Config
from pipeline.data.stream import Batch
from pipeline.parallel.batch import batch_shape
from pipeline.parallel.watch.whereabouts import Progress
from pipeline.players import build
from pipeline.run.stats import Stats
from pipeline.step import train_step

GPU = torch.device("cuda:0")
COMMON = ("data.train=none", "data.size=64", "data.batch_size=64", "penalty.l2=1e-4")
_NORM_FREE = ("G.norm=none", "D.norm=none")
_ALL_ON = (
    "data.batch_gpu=32", "loss.D_steps=2", "penalty.l1=1e-5", "penalty.r1.gamma=1", "penalty.r1.interval=1",
    *(f"{player}.{key}" for player in "GD" for key in ("dropout=0.1", "spectral_norm=true")),
    *(f"optim.{player}.clip=1" for player in "GD"),
)  # fmt: skip
CASES = {  # name → precision, settings
    "fp32, batch norm": ("no", COMMON),
    "fp32, no norm": ("no", (*COMMON, *_NORM_FREE)),
    "bf16, batch norm": ("bf16", COMMON),
    "bf16, no norm": ("bf16", (*COMMON, *_NORM_FREE)),
    "fp32, all on": ("no", (*COMMON, *_ALL_ON)),
    "bf16, all on": ("bf16", (*COMMON, *_ALL_ON)),
}
_NO_LAUNCH = ("aten::empty", "aten::new_empty", "aten::detach", "aten::_unsafe_view", "aten::lift_fresh")


class Device(TorchDispatchMode):
    """Counts the operations on the device, and notes where the host would wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, name = func(*args, **(kwargs or {})), func.name()
        given, made = ([t for t in tree_leaves(x) if torch.is_tensor(t)] for x in ((args, kwargs), out))
        if func.namespace == "aten" and any(t.is_cuda for t in (*given, *made)):
            if not func.is_view and not name.startswith(_NO_LAUNCH):
                self.launches[name] += 1
            if name.startswith(("aten::_to_copy", "aten::copy_")) and made[0].is_cuda != given[-1].is_cuda:
                if given[-1].is_cuda or not ((kwargs or {}).get("non_blocking") or args[2:3] == (True,)):
                    self._note(name)
            elif name == "aten::_local_scalar_dense":
                self._note(name)
        return out

    def _note(self, name: str) -> None:
        ours = [f for f in traceback.extract_stack() if "/pipeline/" in f.filename]
        self.waits.append(f"{name} at {Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else name)


def main(out: Path) -> None:
    found = {}
    for name, (precision, settings) in CASES.items():
        options = config.load(None, settings)
        with pretending(), FakeTensorMode():
            ours = training(options, precision)
            found[name] = {"ours": ours.launches, "waits": ours.waits}
            if "all on" not in name:
                found[name]["bare"] = bare_maths(options, precision).launches
    with FakeTensorMode(), Device() as control:
        torch.zeros(3).to(GPU, non_blocking=True)
        torch.zeros(3).to(GPU)
        torch.zeros(3, device=GPU).to("cpu", non_blocking=True)
        torch.zeros(3, device=GPU).copy_(torch.zeros(3))
    out.write_text(json.dumps(found | {"control": {"waits": control.waits}}))


@contextlib.contextmanager
def pretending() -> Iterator[None]:
    """What Python's side of torch.cuda, which knows that there is none, is asked for in a step."""
    event = SimpleNamespace(record=lambda: None)
    with (
        patch.object(torch.cuda, "Event", lambda **_: event),
        patch.object(torch.cuda, "default_generators", (torch.Generator(),)),
        patch.object(torch.cuda, "is_bf16_supported", lambda *_, **__: True),
        patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        patch.object(FakeTensorMode, "avoid_device_init", True),
        patch.object(nn.Module, "_apply", convert_without_memory),
    ):
        yield


def training(options: Config, precision: str) -> Device:
    """The third update of a training by one process."""
    ranks: Any = SimpleNamespace(
        rank=0, world=1, main=True, strategy="single", device=GPU, precision=precision, progress=Progress(),
        low_precision=torch.bfloat16 if precision == "bf16" else None, sum=lambda values: values,
    )  # fmt: skip
    gan, stats = build(options, ranks, batch_shape(options.data, 1)), Stats(GPU)
    batch = Batch(torch.zeros(64, options.data.channels, 64, 64, dtype=torch.uint8), None)
    cur_nimg = 0
    for _ in range(2):
        cur_nimg = train_step(gan, iter([batch] * 2), cur_nimg, stats)
    with Device() as device:
        train_step(gan, iter([batch] * 2), cur_nimg, stats)
    return device


def bare_maths(options: Config, precision: str) -> Device:
    """The second update of the same maths and nothing else."""
    bare = BareMaths(options, GPU, precision == "bf16")
    real = torch.zeros(64, options.data.channels, 64, 64, device=GPU).to(memory_format=torch.channels_last)
    z = torch.zeros(64, options.G.z_dim, device=GPU)
    bare.update(real, z, z)
    with Device() as device:
        bare.update(real, z, z)
    return device


if __name__ == "__main__":
    main(Path(sys.argv[1]))
