"""What passes between ranks: every collective that PyTorch's dispatcher hands to a process group."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from launch.selfcheck import parity
from launch.selfcheck.parity import Case
from pipeline.config import UserError
from pipeline.errors import CommonError
from pipeline.gan.losses import adversarial
from pipeline.gan.schedules import at
from pipeline.parallel.engine import Engine
from pipeline.parallel.ranks import Ranks, taking_part
from pipeline.run.stats import Stats
from pipeline.step import train_step

# Two cases that differ in their penalties alone, L2 and L1 on all parameters against none; with rounds and
# clipping, and with neither.
OPTIMIZER = ("optim.G.clip=0.5", "optim.D.clip=0.3")
SYNC_BATCH = ("G.options.norm=sync_batch", "D.options.norm=sync_batch")
PENALTIES = ("penalty.l2=1e-3", "penalty.l1=1e-4", "penalty.on=all")
LATENT = ("G.kind=launch.selfcheck.networks:LatentGenerator",)
PATH = ("penalty.path.weight=1", "penalty.path.interval=2")  # due in the third update
CASES = {
    "plain": Case("plain", ()),
    "plain-penalised": Case("plain-penalised", PENALTIES),
    "clipped": Case("clipped", OPTIMIZER, rounds=2),
    "clipped-penalised": Case("clipped-penalised", (*OPTIMIZER, *PENALTIES), rounds=2),
    "sync-batch": Case("sync-batch", SYNC_BATCH, rounds=2),
    "sync-batch-r1": Case("sync-batch-r1", (*SYNC_BATCH, "penalty.r1.gamma=1", "penalty.r1.interval=1")),
    "latent": Case("latent", LATENT, rounds=2),
    "path": Case("path", (*LATENT, *PATH), rounds=2),
}
NORMS = {"G": (10, 5), "D": (10,)}  # channels of the layers of batch norm under sync_batch
# Objectives, each in one round and in two.
PAIRED = ("loss.kind=relativistic", "penalty.r1.gamma=1", "penalty.r1.interval=1", "penalty.r2.gamma=1")
OBJECTIVES: dict[str, tuple[str, ...]] = {
    "plain": (),
    "r1-r2": PAIRED,
    "half": (*PAIRED, "penalty.r1.fraction=1/2", "penalty.r2.fraction=1/2"),
    "difference": (*PAIRED, "penalty.r1.sigma=0.3", "penalty.r2.sigma=0.3"),
    "wgan-gp": ("loss.kind=wasserstein", "penalty.wgan_gp.weight=10"),
}
ROUNDS = (1, 2)
ANSWER = 100_000  # letters
Call = tuple[str, int]  # operation, and among which ranks if not all; bytes of its largest argument


class Wire(TorchDispatchMode):
    """Notes each collective while it is entered, from Python or from C++."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            size = max((_bytes(argument) for argument in args), default=0)
            self.calls.append((func._schema.name.partition("::")[2] + _among(args), size))
        return func(*args, **(kwargs or {}))


def record(ranks: Ranks) -> dict[str, dict[str, Any]]:
    """For each case: the calls of its third update, those of a tick after it, and the players' sizes. The
    calls of a third update with each objective. And those of an answer from the main rank, with what every
    rank got of it."""
    cases = {name: _record(case, ranks) for name, case in CASES.items()}
    objectives = {
        f"{name}-{rounds}": found for rounds in ROUNDS for name, found in _objectives(rounds, ranks)
    }
    return cases | {"objectives": objectives, "from_main": _from_main(ranks)}


def _among(arguments: tuple[Any, ...]) -> str:
    """Hybrid sharding has groups of a copy's ranks, which are next to each other, and of copies."""
    members = taking_part(arguments)
    if len(members) in (0, dist.get_world_size()):
        return ""
    return " within a copy" if members[1] == members[0] + 1 else " over copies"


def _from_main(ranks: Ranks) -> dict[str, Any]:
    with Wire() as wire:
        answer = ranks.broadcast_from_main(lambda: "x" * ANSWER)
    try:
        failure = str(ranks.broadcast_from_main(_fail))
    except CommonError as error:
        failure = f"failed: {error}"
    return {"calls": wire.calls, "got": ranks.gather_objects((len(answer), failure))}


def _fail() -> None:
    raise UserError("no such folder")


def _record(case: Case, ranks: Ranks) -> dict[str, Any]:
    case = replace(case, batch=parity.shared_batch(ranks.world))
    state = parity.initial_state(case)
    gan, batches = parity.start(case, state, ranks)
    stats = Stats(ranks.device)
    for _ in range(2):  # what is settled in the first passes (traces, buckets) has been
        state.cur_nimg = train_step(gan, batches, state.cur_nimg, stats)
    with Wire() as update:
        train_step(gan, batches, state.cur_nimg, stats)
    with Wire() as tick:
        stats.reduce(ranks, {"seconds": 1.0, "waited": 0.5})
    sizes = {engine.player.name: _size(engine) for engine in (gan.G, gan.D)}
    return {"update": update.calls, "tick": tick.calls, "bytes": sizes}


def _objectives(rounds: int, ranks: Ranks) -> Iterator[tuple[str, dict[str, Any]]]:
    """(objective, what `_record` finds of an update): one pair of engines has them all, one after another."""
    common = Case("objectives", (), rounds, batch=2 * parity.shared_batch(ranks.world))
    gan, batches = parity.start(common, parity.initial_state(common), ranks)
    batch, stats = next(batches), Stats(ranks.device)
    sizes = {engine.player.name: _size(engine) for engine in (gan.G, gan.D)}
    for name, settings in OBJECTIVES.items():
        config = replace(common, settings=settings).config(ranks.world)
        losses, mixes = adversarial(config.loss.kind), config.penalty.wgan_gp.weight > 0
        trained = replace(gan, at=partial(at, config), losses=losses, mixes=mixes)
        for _ in range(2):
            train_step(trained, iter([batch]), 0, stats)
        with Wire() as update:
            train_step(trained, iter([batch]), 0, stats)
        yield name, {"update": update.calls, "bytes": sizes}


def _size(engine: Engine) -> int:
    """Bytes of a player's parameters, each padded to what divides equally over the ranks of a copy: its first
    axis under FSDP2, its elements under ZeRO 3."""
    world, strategy = engine.ranks.shards, engine.ranks.strategy
    size = 0
    for shape in (fragment.shape for fragment in engine.fragments):
        units = {"fsdp2": shape[0], "hsdp": shape[0], "zero3": shape.numel()}.get(strategy)
        padded = shape.numel() if units is None else -(-units // world) * world * (shape.numel() // units)
        size += 4 * padded
    return size


def _bytes(argument: Any) -> int:
    return sum(t.numel() * t.element_size() for t in _tensors(argument))


def _tensors(argument: Any) -> Iterator[torch.Tensor]:
    if isinstance(argument, torch.Tensor):
        yield argument
    elif isinstance(argument, list | tuple):
        for part in argument:
            yield from _tensors(part)
