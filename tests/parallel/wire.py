"""What passes between ranks: every collective that PyTorch's dispatcher hands to a process group."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from launch.selfcheck import parity
from launch.selfcheck.parity import Case
from pipeline.config import Config, UserError
from pipeline.errors import CommonError
from pipeline.gan.losses import adversarial
from pipeline.gan.schedules import at
from pipeline.parallel.engine import Engine
from pipeline.parallel.ranks import Ranks
from pipeline.players import Gan
from pipeline.run.stats import Stats
from pipeline.step import train_step

# Two cases that differ in their penalties alone, L2 and L1 on all parameters against none; with rounds and
# clipping, and with neither.
OPTIMIZER = ("optim.G.clip=0.5", "optim.D.clip=0.3")
PENALTIES = ("penalty.l2=1e-3", "penalty.l1=1e-4", "penalty.on=all")
CASES = {
    "plain": Case("plain", ()),
    "plain-penalised": Case("plain-penalised", PENALTIES),
    "clipped": Case("clipped", OPTIMIZER, rounds=2),
    "clipped-penalised": Case("clipped-penalised", (*OPTIMIZER, *PENALTIES), rounds=2),
}
# What D's turn may contain besides; each in one round and in two, by the same engines.
SLOPES = ("penalty.r1.gamma=1", "penalty.r1.interval=1", "penalty.r2.gamma=1")
OBJECTIVES: dict[str, tuple[str, ...]] = {
    "plain": (),
    "r1-r2": ("loss.kind=relativistic", *SLOPES),
    "half": ("loss.kind=relativistic", *SLOPES, *(f"penalty.r{n}.fraction=1/2" for n in (1, 2))),
    "difference": ("loss.kind=relativistic", *SLOPES, *(f"penalty.r{n}.sigma=0.3" for n in (1, 2))),
    "wgan-gp": ("loss.kind=wasserstein", "penalty.wgan_gp.weight=10"),
}
ROUNDS = (1, 2)
ANSWER = 100_000  # letters
Call = tuple[str, int]  # operation, bytes of its largest argument


class Wire(TorchDispatchMode):
    """Notes each collective while it is entered, from Python or from C++."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            size = max((_bytes(argument) for argument in args), default=0)
            self.calls.append((func._schema.name.partition("::")[2], size))
        return func(*args, **(kwargs or {}))


def record(ranks: Ranks) -> dict[str, dict[str, Any]]:
    """For each case: the calls of its third update, those of a tick after it, and the players' sizes. The
    calls of an update with each objective. And those of an answer from the main rank, with what every rank
    got of it."""
    cases = {name: _record(case, ranks) for name, case in CASES.items()}
    objectives = {f"{name}-{rounds}": found for rounds in ROUNDS for name, found in _objectives(rounds, ranks)}
    return cases | {"objectives": objectives, "from_main": _from_main(ranks)}


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
    """(objective, calls of its second update and the players' sizes): one pair of engines for them all."""
    common = Case("objectives", (), rounds, batch=24)
    gan, batches = parity.start(common, parity.initial_state(common), ranks)
    batch, stats = next(batches), Stats(ranks.device)
    sizes = {engine.player.name: _size(engine) for engine in (gan.G, gan.D)}
    for name, settings in OBJECTIVES.items():
        trained = _with_objective(gan, replace(common, settings=settings).config(ranks.world))
        train_step(trained, iter([batch]), 0, stats)
        with Wire() as update:
            train_step(trained, iter([batch]), common.batch, stats)
        yield name, {"update": update.calls, "bytes": sizes}


def _with_objective(gan: Gan, config: Config) -> Gan:
    losses, mixes = adversarial(config.loss.kind), config.penalty.wgan_gp.weight > 0
    return replace(gan, at=partial(at, config), losses=losses, mixes=mixes)


def _size(engine: Engine) -> int:
    """Bytes of a player's parameters, each padded to what divides equally over the ranks: its first axis
    under FSDP2, its elements under ZeRO 3."""
    world, strategy = engine.ranks.world, engine.ranks.strategy
    size = 0
    for shape in (fragment.shape for fragment in engine.fragments):
        units = {"fsdp2": shape[0], "zero3": shape.numel()}.get(strategy)
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
