"""Skipped updates, tried in the ranks of a launch: one rank's images, loss or penalty is not finite.

Each case is trained twice, with such tries before every update and without. G's path length is penalised in
one: the moving mean that it is compared with is part of the state.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.distributed import distributed_c10d as c10d

from launch.selfcheck import parity
from launch.selfcheck.parity import Case
from pipeline.data.stream import Batch
from pipeline.errors import CommonError, UserError
from pipeline.gan import dcgan
from pipeline.parallel.engine import Engine
from pipeline.parallel.ranks import Ranks
from pipeline.parallel.weight_penalty import LocalPenalty
from pipeline.players import Gan
from pipeline.run.stats import Stats
from pipeline.step import train_step, update_D, update_G

_NETWORKS = (
    "G.options={width: 5, norm: batch}",
    "D.options={width: 5, norm: batch, spectral_norm: true}",
    "penalty.l2=1e-3",
)
_SGD, _ADAM = (
    tuple(f"optim.{player}.{key}" for player in "GD" for key in keys)
    for keys in (("kind=sgd", "lr=0.02", "momentum=0.5"), ("kind=adam", "lr=1e-3"))
)
_PATH = (
    "G.kind=launch.selfcheck.networks:LatentGenerator",
    *("penalty.path.weight=0.1", "penalty.path.interval=1", "penalty.path.decay=0.5"),
)
CASES = {
    "sgd": Case("sgd", (*_NETWORKS, *_SGD, *_PATH)),
    "adam-clipped-rounds": Case(
        "adam-clipped-rounds", (*_NETWORKS, *_ADAM, "optim.G.clip=0.5", "optim.D.clip=0.3"), rounds=2
    ),
}
TRIES = ("D-images", "D-loss", "D-penalty", "G-loss", "G-penalty")
_UPDATES = 2
Tensors = dict[str, torch.Tensor]
Turn = Callable[[Gan, bool], None]  # of these players, on infinite images or not


def record(ranks: Ranks) -> dict[str, dict[str, list[str]]]:
    """For each case and each kind of try: what it changed on some rank, which should be nothing; under
    "after": what differs at the end between the training with tries and the one without."""
    return {name: _record(case, ranks) for name, case in CASES.items()}


def settled(ranks: Ranks) -> dict[str, Any]:
    """Settings that libraries must not change: each process group's timeout in seconds, what NCCL does when
    ranks fail, and under ZeRO whether DeepSpeed's timer is on."""
    gan, _ = parity.start(CASES["sgd"], parity.initial_state(CASES["sgd"]), ranks)
    engine: Any = gan.G
    return {
        "timeouts": [_timeout(group) / timedelta(seconds=1) for group in c10d._world.pg_map],
        "nccl": {name: value for name, value in os.environ.items() if name.startswith("TORCH_NCCL_")},
        "timer": ranks.strategy.startswith("zero") and engine._ds.tput_timer.config.enabled,
    }


class Sometimes(dcgan.Generator):
    """Its last layer takes part in some updates only."""

    takes_part = True

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.last = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, z: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        images = super().forward(z, c)
        return self.last(images) if Sometimes.takes_part else images


def idle(ranks: Ranks) -> list[bool | str]:
    """Whether the layer moved in an update that it took part in, and in the two after it that it did not;
    under ddp over several ranks, why that is refused: at the start, and then in the first such update."""
    case = Case("idle", ("G.kind=skips:Sometimes", *_SGD, "optim.G.momentum=0"))
    moved: list[bool | str] = []
    if ranks.world > 1 and ranks.strategy == "ddp":
        Sometimes.takes_part = False
        try:
            parity.start(case, parity.initial_state(case), ranks)
        except CommonError as error:
            moved.append(str(error))
    Sometimes.takes_part = True
    gan, batches = parity.start(case, parity.initial_state(case), ranks)
    layer = [f.data for f in gan.G.fragments if f.name.startswith("last.")]
    for number, Sometimes.takes_part in enumerate((True, False, False)):
        before = [weights.clone() for weights in layer]
        try:
            train_step(gan, batches, number * case.batch, Stats(ranks.device))
        except UserError as error:
            return [*moved, str(error)]
        equal = all(torch.equal(a, b) for a, b in zip(before, layer, strict=True))
        moved.append(not all(ranks.gather_objects(equal)))
    return moved


def _timeout(group: Any) -> timedelta:
    found: timedelta = group._get_backend(torch.device("cpu")).options._timeout
    return found


def _record(case: Case, ranks: Ranks) -> dict[str, list[str]]:
    changed: dict[str, list[str]] = {kind: [] for kind in TRIES}

    def tries(player: str, gan: Gan, turn: Turn) -> None:
        for kind in (kind for kind in TRIES if kind.startswith(player)):
            before = _snapshot(gan, moments=False)
            with _spoilt(kind, gan, ranks) as (spoilt, images):
                turn(spoilt, images)
            changed[kind] += _differing(before, _snapshot(gan, moments=False))

    after = _differing(_train(case, ranks, lambda *_: None), _train(case, ranks, tries))
    everyone = ranks.gather_objects(changed | {"after": after})
    return {kind: sorted({name for mine in everyone for name in mine[kind]}) for kind in everyone[0]}


def _train(case: Case, ranks: Ranks, tries: Callable[[str, Gan, Turn], None]) -> Tensors:
    """The state after some updates; `tries` is called before each turn, with the player and the turn."""
    state, stats = parity.initial_state(case), Stats(ranks.device)
    gan, batches = parity.start(case, state, ranks)
    for nimg in range(0, _UPDATES * case.batch, case.batch):
        reals = next(batches)

        def turn_of_D(gan: Gan, infinite: bool, reals: Batch = reals, nimg: int = nimg) -> None:
            images = torch.full(reals.images.shape, torch.inf) if infinite else reals.images
            update_D(gan, reals._replace(images=images), nimg, stats)

        def turn_of_G(gan: Gan, _infinite: bool, reals: Batch = reals, nimg: int = nimg) -> None:
            update_G(gan, reals, nimg + case.batch, stats)

        for player, turn in (("D", turn_of_D), ("G", turn_of_G)):
            tries(player, gan, turn)
            turn(gan, False)
        gan.G_ema.update(gan.at(nimg).ema_beta)
    return _snapshot(gan, moments=True)


@contextmanager
def _spoilt(kind: str, gan: Gan, ranks: Ranks) -> Iterator[tuple[Gan, bool]]:
    """The same players on all ranks but the last, on which something is not finite once."""
    player, _, what = kind.partition("-")
    if ranks.rank != ranks.world - 1:
        yield gan, False
    elif what == "loss":
        right = getattr(gan.losses, player.lower())

        def loss(*logits: torch.Tensor) -> torch.Tensor:
            return right(*logits) * float("nan")

        yield replace(gan, losses=replace(gan.losses, **{player.lower(): loss})), False
    elif what == "penalty":
        sums = LocalPenalty.sums

        def spoilt(self: LocalPenalty, *given: torch.Tensor) -> Tensors:
            return {part: value * float("nan") for part, value in sums(self, *given).items()}

        with patch.object(LocalPenalty, "sums", spoilt):
            yield gan, False
    else:
        yield gan, True


def _snapshot(gan: Gan, moments: bool) -> Tensors:
    """Copies of all that this rank trains. Moments exist from the first update on."""
    found = {f"{e.player.name}/{name}": t.clone() for e in (gan.G, gan.D) for name, t in _state(e, moments)}
    return found | {f"G_ema/{n}": average.clone() for n, average in enumerate(gan.G_ema.averages)}


def _state(engine: Engine, moments: bool) -> Iterator[tuple[str, torch.Tensor]]:
    yield from ((f.name, f.data) for f in engine.fragments)
    yield from engine.buffers().items()
    yield "moving_mean", engine.moving_mean.value
    for fragment, state in zip(engine.fragments, engine.optimizer_state() if moments else (), strict=False):
        yield from ((f"{fragment.name}/{key}", value) for key, value in state.items())


def _differing(a: Tensors, b: Tensors) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name, tensor in a.items() if not torch.equal(tensor, b[name])]
