"""Training steps on a GPU that is not there: `LD_PRELOAD=fake_cuda.so python -m on_fake_cuda OUT`.

Tensors have shapes and a device but no memory. Writes to OUT, as JSON: for each case the operations of one
update on the device, ours and those of the bare maths (launch/bench/rivals.py), the places in ours where the
host waits for the device, and the tensors that ours leaves to the garbage collector; the same, or the error,
for each planted mistake; and the order in which the nodes of a gradient that is differentiated again run.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args
from unittest.mock import Mock, patch

import torch
import torch.distributed as dist
from on_fake_cuda_cases import COMPARED, GPU, OTHERS, Case
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from launch.doctor.memory import convert_without_memory
from pipeline.config import Norm
from pipeline.data.stream import Batch
from pipeline.gan import second_order
from pipeline.gan.layers import norm_layer
from pipeline.gan.r3gan import Discriminator
from pipeline.garbage import uncollected
from pipeline.parallel.batch import batch_shape
from pipeline.parallel.engine import Contribution
from pipeline.parallel.watch.whereabouts import Progress
from pipeline.players import build
from pipeline.run.stats import Stats
from pipeline.step import train_step

LOW = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
SPREAD = 32  # updates of which statistics are added up in one go


_NO_LAUNCH = ("aten::empty", "aten::new_empty", "aten::detach", "aten::_unsafe_view", "aten::lift_fresh")


def _read(images: Tensor) -> Tensor:
    return images * images.sum().item()


def _cyclic(images: Tensor) -> Tensor:
    cycle: list[Any] = [images * 1]
    cycle.append(cycle)
    return images


MISTAKES: dict[str, Callable[[Tensor], Tensor]] = {  # made with every image that D sees
    "a value that is read": _read,
    "a tensor on the CPU": lambda images: images + torch.zeros(images.shape),
    "a copy that blocks": lambda images: images + torch.zeros(images.shape).to(GPU),
    "a copy of what is not pinned": lambda x: x + torch.zeros(x.shape).to(GPU, non_blocking=True),
    "a cycle": _cyclic,
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
                pinned = hasattr(given[-1], "pinned")  # from other memory a copy may wait
                self.waits += [] if patient and pinned else [_where(name)]
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
    found["order"] = {"cpu": order(torch.device("cpu"))}
    with pretending():
        found["order"]["device's thread"] = order(GPU)
        found["norms"] = norms()
    out.write_text(json.dumps(found))


@contextlib.contextmanager
def pretending() -> Iterator[None]:
    """Tensors without memory; and whatever a step asks of Python's side of torch.cuda, which knows that there
    is no GPU."""
    with (
        FakeTensorMode(),
        patch.multiple(
            torch.cuda,
            Event=_Event,
            Stream=_Stream,
            stream=contextlib.nullcontext,
            current_stream=_Stream,
            current_device=lambda: 0,
            is_current_stream_capturing=lambda: False,
            default_generators=(torch.Generator(),),
            is_bf16_supported=lambda *_, **__: True,
            _lazy_init=lambda: None,
        ),
        patch.object(Tensor, "pin_memory", _pinned),
        patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        patch.object(FakeTensorMode, "avoid_device_init", True),
        patch.object(nn.Module, "_apply", convert_without_memory),
        patch.object(DeviceMesh, "from_group", _mesh),
    ):
        yield


def _pinned(tensor: Tensor) -> Any:
    if hasattr(tensor, "pinned"):
        return tensor
    copy: Any = tensor.clone()
    copy.pinned = True
    return copy


class _Event:
    def __init__(self, **_: Any) -> None: ...

    def record(self, _: Any = None) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Any) -> float:
        return 0.0


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
    batch = Batch(
        torch.zeros(local, options.data.channels, *[options.data.size] * 2, dtype=torch.uint8), labels
    )
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
    garbage = left(lambda: train_step(gan, iter([batch] * 2), cur_nimg, stats))
    return {
        "garbage": garbage,
        "ours": sum(device.launches.values()) + sum(adding.launches.values()) / SPREAD,
        "gathers": device.gathers,
        "waits": device.waits + adding.waits,
    }


def left(update: Callable[[], object]) -> list[tuple[int, ...]]:
    """Shapes of the tensors that would stay on the device until Python looks for cyclic garbage."""
    gc.collect()
    with uncollected():
        update()
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        gc.set_debug(0)
    found = [tuple(x.shape) for x in gc.garbage if isinstance(x, Tensor)]
    gc.garbage.clear()
    return found


def order(device: torch.device) -> dict[str, Any]:
    """Of R1 + R2 on R3GAN's D, after hundreds of updates: the nodes' names as the last backward pass runs
    them, and whether it does so in another thread, as each device has one."""
    for _ in range(2**18):
        torch._C._functions.UndefinedGrad()  # takes one of this thread's numbers
    D = Discriminator(size=32, channels=3, width=8).to(device)
    images = [torch.zeros(4, 3, 32, 32, device=device).requires_grad_() for _ in ("real", "fake")]
    real, fake = logits = [D(image) for image in images]
    loss = nn.functional.softplus(fake - real).mean()
    for logit, image in zip(logits, images, strict=True):
        loss = loss + second_order.gradient(logit.sum(), image).square().sum()
    names: list[str] = []
    threads: set[int] = set()

    def note(node: Any) -> Callable[[Any], None]:
        return lambda _: (names.append(node.name()), threads.add(threading.get_ident()))[0]

    found, seen = [loss.grad_fn], set()
    while found:
        if (node := found.pop()) is None or node in seen:
            continue
        seen.add(node)
        found += [next_node for next_node, _ in node.next_functions]
        if "AccumulateGrad" not in node.name():
            node.register_prehook(note(node))
    loss.backward()
    return {"names": names, "elsewhere": threading.get_ident() not in threads}


def norms() -> dict[str, str]:
    """The dtype in which each norm gives its features under autocast to bf16."""
    features = torch.zeros(4, 16, 8, 8, device=GPU, dtype=torch.bfloat16)
    layers = {kind: norm_layer(kind, 16).to(GPU) for kind in get_args(Norm)}
    with torch.autocast("cuda", dtype=torch.bfloat16):
        return {kind: str(layer(features).dtype) for kind, layer in layers.items()}


def bare_maths(case: Case) -> int:
    """The second update of the same maths and nothing else."""
    bare, data = case.bare(), case.config.data
    real = torch.zeros(data.batch_size, data.channels, data.size, data.size, device=GPU)
    real = real.to(memory_format=torch.channels_last)
    z = torch.zeros(data.batch_size, case.z_columns, device=GPU)
    bare.update(real, z, z)
    with Device() as device:
        bare.update(real, z, z)
    return sum(device.launches.values())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    os._exit(0)  # Python's own end would end the device's thread while it lets go of what `order` noted
