"""One player: a network, its optimizer and its weight penalties, behind one interface for every strategy.

The training step is written against `Engine` and knows neither ranks nor strategies. A strategy defines where
gradients are averaged, where the fragments are and how to step. What must be equal under all strategies
(rounds, randomness, freezing, precision, charts) is written once, here.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.config import Optimizer, WeightPenalty
from pipeline.gan.draws import Drawn, Samples
from pipeline.gan.schedules import Rates
from pipeline.parallel.batch import BatchShape
from pipeline.parallel.buffers import Buffers, BufferSnapshot
from pipeline.parallel.compiled import CompiledBlocks, computing
from pipeline.parallel.forward_timing import ForwardTimer
from pipeline.parallel.fragments import Fragment, finite
from pipeline.parallel.loss_scale import LossScale
from pipeline.parallel.moving_mean import MovingMean
from pipeline.parallel.order import Order
from pipeline.parallel.ranks import Ranks
from pipeline.parallel.seeding import seed_generators
from pipeline.parallel.weight_penalty import LocalPenalty


@dataclass(frozen=True)
class Contribution:
    """One rank's part of a statistic, whose value is Σ total · factors / Σ weight over all ranks."""

    total: torch.Tensor
    weight: float
    unit: float  # sum of `weight` over all ranks in one update
    factors: tuple[float, ...] = ()  # `total`, fp64, is still to be multiplied by these, one after another


@dataclass(frozen=True)
class PlayerSettings:
    """What an engine needs besides its network."""

    name: str  # "G" or "D", as in names of charts and files
    optimizer: Optimizer
    penalty: WeightPenalty
    penalised: Mapping[str, float]  # parameters the penalty covers, and factors (gan/penalised.py)
    channels_last: bool = False  # its kernels in memory, where a rank holds them whole
    # On the main rank: the whole parameters, on the CPU, that the config freezes, for checkpoints.
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict)


class Engine(abc.ABC):
    """One player under some strategy."""

    fragments: list[Fragment]  # this rank's fp32 masters of every trainable parameter, in the module's order
    penalty: LocalPenalty  # over the fragments

    def __init__(self, module: nn.Module, player: PlayerSettings, ranks: Ranks, batch: BatchShape) -> None:
        self.module = module
        self.player = player
        self.ranks = ranks
        self.batch = batch
        parts = [batch.part(ranks.rank, number) for number in range(batch.rounds)]
        whole = batch.world * batch.local
        self.samples = Samples(whole, tuple(parts)) if batch.world > 1 else Samples.all(whole)
        self.frozen = False
        self.twice = False  # whether passes of this turn are differentiated twice
        self.forward_timer = ForwardTimer(ranks.device)
        self.loss_scale = LossScale(ranks.device) if ranks.precision == "fp16" else None
        self.moving_mean = MovingMean(ranks)  # for a penalty that compares with one
        self.order: Order | None = None  # of layers, where it decides what is gathered
        self.compiled: CompiledBlocks | None = None  # set once the strategy has wrapped the network
        # Unfreezing after the other player's turn must not touch parameters that never train.
        self._trainable = [p for p in module.parameters() if p.requires_grad]
        self._buffers = Buffers(module, ranks.device)
        self._first = {name: (b.shape, b.isfinite().all()) for name, b in module.named_buffers()}
        self._finite: torch.Tensor | None = None  # whether this turn's update was finite; None before it
        self._found_inf = torch.zeros((), device=ranks.device)  # the opposite, as optimizers take it
        self._squares = torch.zeros((), dtype=torch.float64, device=ranks.device)  # gradient norm to chart

    # What a strategy defines

    @property
    @abc.abstractmethod
    def copies(self) -> int:
        """How many ranks hold each element: 1 if the player is sharded over all ranks, the world if it is
        replicated. In between, each copy is sharded over ranks that are next to each other."""

    def forward(self, *inputs: Any) -> torch.Tensor:
        """The forward pass whose gradients will be averaged over ranks."""
        output: torch.Tensor = self.module(*inputs)
        return output

    @abc.abstractmethod
    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """Wraps forward and backward of one round; the last averages gradients over ranks."""

    @abc.abstractmethod
    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradient of one round's loss; the rounds of an update are averaged."""

    @abc.abstractmethod
    def step(self, now: Rates) -> dict[str, Contribution]:
        """Add the weight penalties, clip, update at the rates of `now`.

        Returns charts: the penalties at the weights before the update, and the squared gradient norm
        (penalties included, before clipping).
        """

    @abc.abstractmethod
    def moments(self) -> list[dict[str, torch.Tensor]]:
        """For each fragment, the optimizer's tensors: fragment-shaped ones and scalars (`step`)."""

    @abc.abstractmethod
    def load_moments(self, states: list[dict[str, torch.Tensor]]) -> None:
        """Restore what `moments` returned."""

    @abc.abstractmethod
    def zero_grad(self) -> None:
        """Clear the gradients."""

    def masters_changed(self) -> None:  # noqa: B027 (masters and parameters mostly share memory)
        """Update the network's parameters after fragments were written from outside."""

    def begin_turn(self) -> None:  # noqa: B027
        """Before a turn. No weight changes until its end, so gathered parameters may stay gathered."""

    def end_turn(self) -> None:  # noqa: B027
        """After a turn: reshard what is still gathered."""

    # What all strategies share

    def __call__(self, *inputs: Any) -> torch.Tensor:
        """The network's output. In the other player's turn the bare, frozen network computes it: a wrapper
        that averages gradients would wait for gradients that never come (DDP), or be silently wrong (ZeRO
        stage 3)."""
        self.ranks.progress.moves += 1
        self.doing("forward")
        with self.autocast(), self.forward_timer.measured():
            return self.module(*inputs) if self.frozen else self.forward(*inputs)

    @property
    def latent(self) -> torch.Tensor:
        """What the images of G's last pass were computed from (gan/path_length.py)."""
        return latent_of(self.module)

    @contextmanager
    def updating(self, frozen: Engine, twice: bool = False) -> Iterator[None]:
        """This player's turn: the other one is frozen, and gradients start and end empty.

        twice: a gradient penalty differentiates this player's passes a second time. Attention is then
        computed by plain products, as torch's fused kernels cannot be differentiated twice (pytorch#116350),
        and nothing by compiled code, which cannot either.
        """
        for parameter in frozen._trainable:
            parameter.requires_grad_(False)
        frozen.frozen, self.twice = True, twice
        self.begin_turn()
        frozen.begin_turn()
        snapshot, self._finite = BufferSnapshot(self._buffers, frozen._buffers), None
        try:
            attention = sdpa_kernel(SDPBackend.MATH) if twice else nullcontext()
            ours = None if twice else self.compiled
            with attention, computing(ours, frozen.compiled, plain_attention=twice):
                yield
            if self._finite is not None:
                snapshot.restore(unless=self._finite)
                self.moving_mean.move(self._finite)
        finally:
            self.zero_grad()
            self.end_turn()
            frozen.end_turn()
            frozen.frozen = self.twice = False
            for parameter in frozen._trainable:
                parameter.requires_grad_(True)

    @contextmanager
    def unobserved(self) -> Iterator[None]:
        """Passes inside take no gradient and leave the buffers as they were."""
        snapshot = BufferSnapshot(self._buffers)
        with torch.no_grad():
            yield
        snapshot.restore()

    def doing(self, what: str) -> None:
        """Say what this rank does, for the watch of the other ranks."""
        self.ranks.progress.doing = f"in the {what} of {self.player.name}"

    def rounds(self, drawn: Drawn, *local: torch.Tensor | None) -> Iterator[tuple[Any, ...]]:
        """Cut an update into rounds that fit on the device: yields (drawn, *local), the round's part of each
        on the device.

        All are of this rank's `samples`, tensors [batch.local, …] in the order of rounds; None stays None.
        Gradients are averaged over ranks in the last round.
        """
        images = self.batch.images
        for number in range(self.batch.rounds):
            seed = drawn.seed + self.ranks.rank * self.batch.rounds + number
            seed_generators(seed, self.ranks.device)
            part = slice(number * images, (number + 1) * images)
            z, c, augmentation, mix, *rest = (
                None if tensor is None else sent(tensor[part], self.ranks.device)
                for tensor in (drawn.z, drawn.c, drawn.augmentation, drawn.mix, *local)
            )
            assert z is not None
            with self.accumulating(last=number == self.batch.rounds - 1):
                yield drawn._replace(z=z, c=c, seed=seed, augmentation=augmentation, mix=mix), *rest

    @property
    def in_first_copy(self) -> bool:
        """Whether this rank's fragments belong to the first copy, which is the one in checkpoints."""
        return self.ranks.rank < self.ranks.world // self.copies

    def total(self, local: torch.Tensor) -> torch.Tensor:
        """A sum over this rank's fragments → the sum over all elements, the same on every rank. Takes one
        all-reduce, in place, unless the player is replicated."""
        if self.copies == self.ranks.world:
            return local
        total = self.ranks.sum(local)
        return total if self.copies == 1 else total / self.copies

    def whole(self, pieces: list[torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """Fragment-shaped tensors (weights, moving averages) → (name, whole tensor) on every rank.

        Collective if the player is sharded, one parameter at a time: for images, scores and tests, not for
        the step.
        """
        for fragment, piece in zip(self.fragments, pieces, strict=True):
            if self.copies < self.ranks.world:
                flat = torch.zeros(fragment.shape.numel(), device=self.ranks.device)
                if self.in_first_copy:
                    flat[fragment.start : fragment.start + piece.numel()] = piece.reshape(-1)
                piece = self.ranks.sum(flat)
            yield fragment.name, piece.to(self.ranks.device).view(fragment.shape)  # from the CPU if offloaded

    def autocast(self) -> AbstractContextManager[Any]:
        """bf16 or fp16 arithmetic over fp32 masters if the launcher asks for it."""
        low = self.ranks.low_precision
        return nullcontext() if low is None else torch.autocast(self.ranks.device.type, dtype=low)

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss to differentiate: in fp16, times the loss scale."""
        return loss if self.loss_scale is None else self.loss_scale.up(loss)

    def optimizer_state(self) -> list[dict[str, torch.Tensor]]:
        """For each fragment, what the next step depends on besides the weights: moments and scalars."""
        shared = self.moving_mean.state() | ({} if self.loss_scale is None else self.loss_scale.state())
        return [state | shared for state in self.moments()]

    def load_optimizer_state(self, states: list[dict[str, torch.Tensor]]) -> None:
        """Restore what `optimizer_state` returned, in this precision or another."""
        if self.loss_scale is not None and states and "loss_scale" in states[0]:
            self.loss_scale.load(states[0])
        if states:
            self.moving_mean.load(states[0])
        ours = ("loss_scale", "moving_mean")
        self.load_moments([{k: t for k, t in s.items() if not k.startswith(ours)} for s in states])

    def buffers(self) -> dict[str, torch.Tensor]:
        """What training changes in this rank's network besides its fragments. Not included is what its class
        makes the same every time: parameters that it does not train, and buffers that are infinite from the
        start (attention masks), that come in a forward pass, or that grow there (caches)."""
        found = {}
        for name, buffer in self.module.named_buffers():
            shape, was_finite = self._first.get(name, (None, False))
            if buffer.shape == shape and was_finite:
                found[name] = buffer.detach()
        return found

    def agreed(self, squares: torch.Tensor, penalties: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """This rank's part of the squared gradient norm → the whole, the same on every rank, so that all clip
        and skip alike. Not finite if a penalty is not finite."""
        return self.total(poisoned(squares, penalties).to(self.ranks.device))

    def skipping(self, squares: torch.Tensor) -> torch.Tensor:
        """The optimizer's found_inf, fp32 1.0 or 0.0: whether an update with this squared gradient norm, the
        same on all ranks, is skipped."""
        self._finite = finite(squares)
        self._found_inf = torch.logical_not(self._finite, out=torch.empty_like(self._found_inf))
        scale = self.loss_scale
        self._squares = squares if scale is None else scale.update(squares, self._found_inf)
        return self._found_inf

    def clip(self, gradients: list[torch.Tensor], squares: torch.Tensor) -> None:
        """Scale down to the largest allowed norm, as torch's clip_grad_norm_ does, on the device."""
        if self.player.optimizer.clip is not None:
            factor = (self.player.optimizer.clip / (squares.sqrt() + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(gradients, factor.to(gradients[0].device, gradients[0].dtype))

    def outcome(self, penalties: Mapping[str, torch.Tensor], now: Rates) -> dict[str, Contribution]:
        """Charts of the update that `skipping` has decided on. An overflow that the loss scale answers by
        halving is not charted as skipped."""
        skipped = self._found_inf if self.loss_scale is None else ~finite(self._squares)
        on_all = {"norm": self._squares, "skipped": skipped}
        section, world = f"Gradients/{self.player.name}", float(self.ranks.world)
        factors = self.penalty.factors(now)
        gradient = self.chart("Gradients", self.penalty.gradient(penalties, now), factors)
        return (
            self.chart("Loss", penalties, factors)
            | gradient
            | {f"{section}/{name}": Contribution(value, 1.0, world) for name, value in on_all.items()}
        )

    def chart(
        self,
        section: str,
        local: Mapping[str, torch.Tensor],
        factors: Mapping[str, tuple[float, ...]] = MappingProxyType({}),
    ) -> dict[str, Contribution]:
        """{part: sum over this rank's fragments} → {"section/player/part": contribution}. Over all ranks the
        sums add up to `copies` times the whole. factors: what a part is still to be multiplied by."""
        weight, unit = self.copies / self.ranks.world, float(self.copies)
        prefix = f"{section}/{self.player.name}"
        return {f"{prefix}/{p}": Contribution(v, weight, unit, factors.get(p, ())) for p, v in local.items()}


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on the device, for which the host does not wait.

    From pageable memory it may wait, for all that the stream has to do. torch's cache of pinned memory gives
    none to the next batch before the device has read what it held.
    """
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # itself if it is
    return tensor.to(device, non_blocking=True)


def latent_of(module: nn.Module) -> torch.Tensor:
    latent = module.latent
    assert isinstance(latent, torch.Tensor)
    return latent


def poisoned(value: torch.Tensor, penalties: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The value, or NaN if any penalty is not finite."""
    for penalty in penalties.values():
        value = value.add(penalty, alpha=0)
    return value
