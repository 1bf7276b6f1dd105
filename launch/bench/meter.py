"""What training takes of time and memory, and what it sends between ranks, measured in a rank.

Memory is every living tensor's storage, found by the garbage collector and counted once; this includes what
libraries keep. Traffic is what passes PyTorch's dispatcher to the process group, from Python or C++.
"""

from __future__ import annotations

import gc
import time
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.parallel.engine import Engine
from pipeline.parallel.ranks import taking_part
from pipeline.players import Gan

Storages = dict[int, int]  # address → bytes

# Collectives; the first name that an operation's contains counts.
_KINDS = ("allreduce", "allgather", "reduce_scatter", "broadcast", "alltoall", "reduce")


@contextmanager
def clocked(times: list[float]) -> Iterator[None]:
    """Appends the seconds until all is done inside, on the device too."""
    _synchronise()
    start = time.perf_counter()
    yield
    _synchronise()
    times.append(time.perf_counter() - start)


def _synchronise() -> None:
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()


class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes that this rank sends, by kind of collective.

    In a collective's ring form each of a group's N ranks sends B·(N−1)/N, for an all-reduce twice that; B is
    the larger of input and output.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sent: defaultdict[str, float] = defaultdict(float)
        self.calls: defaultdict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name if func.namespace == "c10d" else ""
        if kind := next((kind for kind in _KINDS if kind in name), None):
            whole = max(_bytes(argument) for argument in args[:2])
            ranks = len(taking_part(args))
            self.sent[kind] += (1 + (kind == "allreduce")) * whole * (ranks - 1) / ranks
            self.calls[kind] += 1
        return func(*args, **(kwargs or {}))


class LivePeak(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most bytes of tensors alive at once, FakeTensors included; those of `known` tensors do not count.

    A storage counts from the operation that outputs it until nothing refers to it.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._now = 0
        self._alive: dict[int, object] = {}  # storage → weak reference, whose callback ends it
        for tensor in known:
            self._alive[tensor.untyped_storage()._cdata] = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def ended(_: object) -> None:
            del self._alive[key]
            self._now -= size

        self._alive[key] = weakref.ref(storage, ended)
        self._now += size
        self.peak = max(self.peak, self._now)


def _bytes(argument: Any) -> int:
    """Of a tensor, or of all tensors in a list."""
    if isinstance(argument, torch.Tensor):
        return argument.numel() * argument.element_size()
    return sum(_bytes(a) for a in argument) if isinstance(argument, list | tuple) else 0


def living() -> Storages:
    """Storages of all tensors on any device."""
    gc.unfreeze()  # parallel/zero.py freezes what is there before DeepSpeed starts: it would not be found
    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    gradients = [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    return storages([*tensors, *gradients])


def storages(tensors: Iterable[torch.Tensor]) -> Storages:
    """Storages of tensors; of a sharded one this rank's part."""
    found: Storages = {}
    for tensor in tensors:
        local = getattr(tensor, "_local_tensor", tensor)
        if local.device.type != "meta" and type(local) in (torch.Tensor, torch.nn.Parameter):
            storage = local.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    found.pop(0, None)  # freed
    return found


def footprint(gan: Gan) -> dict[str, int]:
    """Bytes on this rank now: weights (fp32 masters included), optimizer, G_ema, and all other tensors."""
    weights: Storages = {}
    optimizer: Storages = {}
    for engine in (gan.G, gan.D):
        weights |= storages(_weights(engine))
        optimizer |= storages(t for state in engine.optimizer_state() for t in state.values() if t.ndim)
    ema = storages([*gan.G_ema.averages, *gan.G_ema._module.parameters()])
    other = {address: size for address, size in living().items() if address not in weights | optimizer | ema}
    parts = {"weights": weights, "optimizer": optimizer, "G_ema": ema, "other": other}
    return {name: sum(part.values()) for name, part in parts.items()}


def _weights(engine: Engine) -> Iterable[torch.Tensor]:
    for p in engine.module.parameters():
        yield p
        if hasattr(p, "ds_tensor"):  # ZeRO 3: its part, as the parameter is empty
            yield p.ds_tensor
    yield from (f.data for f in engine.fragments)
