"""Players whose fp32 master weights and averaged gradients are plain local tensors: DDP and FSDP2."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from pipeline.config import Optimizer
from pipeline.gan.schedules import Rates
from pipeline.parallel.batch import BatchShape
from pipeline.parallel.engine import Contribution, Engine, PlayerSettings
from pipeline.parallel.fragments import Fragment, sums_of_squares
from pipeline.parallel.ranks import Ranks
from pipeline.parallel.weight_penalty import LocalPenalty


class MasterEngine(Engine):
    """Takes the step itself: penalties, norm, clipping, optimizer, all on this rank's elements."""

    def __init__(
        self,
        module: nn.Module,
        player: PlayerSettings,
        ranks: Ranks,
        batch: BatchShape,
        masters: Mapping[str, nn.Parameter],
        fragments: list[Fragment],
    ) -> None:
        """masters: this rank's elements of every trainable parameter, as the optimizer updates them.
        fragments: the same elements, described; both in the module's order."""
        super().__init__(module, player, ranks, batch)
        self._masters = masters
        self._fragments = fragments
        self._penalised = [masters[f.name] for f in fragments if f.penalised]
        self.penalty = LocalPenalty.over(fragments, player.penalty)
        self._optimizer = make_optimizer(list(masters.values()), player.optimizer)
        start_momentum(self._optimizer, masters.values())
        self._share = torch.full((), 1 / batch.rounds, device=ranks.device)  # of a round in the loss
        self._loss_gradient = self._share  # what backward passes begin with

    @property
    def fragments(self) -> list[Fragment]:
        return self._fragments

    @abc.abstractmethod
    def collect_gradients(self) -> None:
        """See to it that every master has its gradient, averaged over ranks, in `.grad`."""

    def penalties(self) -> dict[str, torch.Tensor] | None:
        """The weight penalties' values, if the turn began by computing them."""
        return None

    def begin_turn(self) -> None:
        if not self.frozen:
            self._loss_gradient = self.scaled(self._share)

    def backward(self, loss: torch.Tensor) -> None:
        self.doing("backward")
        loss.backward(self._loss_gradient)  # type: ignore[no-untyped-call]

    def step(self, now: Rates) -> dict[str, Contribution]:
        self.doing("step")
        set_rates(self._optimizer, now)
        self.collect_gradients()
        gradients = _gradients(self._masters.values())
        if self.loss_scale is not None:
            self.loss_scale.down_(gradients)
        self.penalty.add_gradient(_gradients(self._penalised))
        penalties = self.penalties()
        squares, of_weights = sums_of_squares(gradients, () if penalties else self.penalty.squared)
        penalties = penalties or self.penalty.values(of_weights)
        squares = self.agreed(squares, penalties)
        self._clip(gradients, squares)
        # A loss, gradient or penalty that is not finite anywhere makes the norm so on every rank: all skip
        # the update alike, decided on the device.
        self._optimizer.found_inf = self.skipping(squares)  # type: ignore[attr-defined]
        self._optimizer.step()
        if self.loss_scale is not None:
            squares = self.loss_scale.update(squares)
        gradient = self.chart("Gradients", self.penalty.gradient(penalties))
        return self.chart("Loss", penalties) | gradient | self.outcome(squares)

    def _clip(self, gradients: list[torch.Tensor], squares: torch.Tensor) -> None:
        """Scale down to the largest allowed norm, as torch's clip_grad_norm_ does, on the device."""
        if self.player.optimizer.clip is not None:
            factor = (self.player.optimizer.clip / (squares.sqrt() + 1e-6)).clamp(max=1.0).float()
            torch._foreach_mul_(gradients, factor)

    def moments(self) -> list[dict[str, torch.Tensor]]:
        return [dict(self._optimizer.state[p]) for p in self._masters.values()]

    def load_moments(self, states: list[dict[str, torch.Tensor]]) -> None:
        for master, state in zip(self._masters.values(), states, strict=True):
            # Moments take the parameter's memory layout: the fused kernels walk both in memory order.
            self._optimizer.state[master] = {
                key: value.to(master.device)
                if key == "step"
                else torch.empty_like(master, requires_grad=False).copy_(value.view(master.shape))
                for key, value in state.items()
            }
        start_momentum(self._optimizer, self._masters.values())

    def zero_grad(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)


def _gradients(parameters: Iterable[nn.Parameter]) -> list[torch.Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def make_optimizer(parameters: list[nn.Parameter], settings: Optimizer) -> torch.optim.Optimizer:
    """The player's optimizer. Fused: 5-7x faster on a CPU, one launch on a GPU, and able to skip an update
    that is not finite without the host knowing."""
    if settings.kind == "sgd":
        return torch.optim.SGD(parameters, lr=settings.lr, momentum=settings.momentum, fused=True)
    adam = {"lr": settings.lr, "betas": settings.betas, "eps": settings.eps, "fused": True}
    if settings.kind == "adamw":
        return torch.optim.AdamW(parameters, weight_decay=settings.decoupled_decay, **adam)  # type: ignore[arg-type]
    return torch.optim.Adam(parameters, **adam)  # type: ignore[arg-type]


def set_rates(optimizer: torch.optim.Optimizer, now: Rates) -> None:
    """Let the next step be taken with these."""
    (group,) = optimizer.param_groups
    group["lr"] = now.lr
    if "betas" in group:
        group["betas"] = now.betas


def start_momentum(optimizer: torch.optim.Optimizer, masters: Iterable[torch.Tensor]) -> None:
    """Give SGD the momentum it starts from, where it has none yet: zeros, which change nothing (0·μ + g = g).

    Torch makes the buffer in the first step, as memory that nobody wrote to, for the kernel to fill; a first
    update that is skipped leaves it so, and the next one multiplies in whatever it holds.
    """
    if optimizer.defaults.get("momentum"):
        for master in masters:
            state = optimizer.state[master]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(master, requires_grad=False)
