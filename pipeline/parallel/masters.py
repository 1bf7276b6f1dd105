"""Players whose fp32 master weights and averaged gradients are plain local tensors: DDP, FSDP2, hsdp."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from pipeline.config import Optimizer
from pipeline.gan.schedules import Rates
from pipeline.parallel.batch import BatchShape
from pipeline.parallel.engine import Contribution, Engine, PlayerSettings
from pipeline.parallel.fragments import Fragment, squares_of
from pipeline.parallel.ranks import Ranks
from pipeline.parallel.weight_penalty import LocalPenalty


class MasterEngine(Engine):
    """Steps by itself: penalties, norm, clipping and optimizer work on this rank's elements."""

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
        self.fragments = fragments
        self._penalised = [masters[f.name] for f in fragments if f.penalised]
        self.penalty = LocalPenalty.over(fragments, player.penalty)
        self._penalties: dict[str, torch.Tensor] | None = None  # their sums, if the turn begins with them
        self._optimizer = make_optimizer(list(masters.values()), player.optimizer)
        start_momentum(self._optimizer, masters.values())
        self._share = torch.full((), 1 / batch.rounds, device=ranks.device)  # of a round in the loss
        self._loss_gradient = self._share  # what backward passes begin with

    @abc.abstractmethod
    def collect_gradients(self) -> None:
        """Put each master's gradient, averaged over ranks, into its `.grad`."""

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
        self.penalty.add_gradient(_gradients(self._penalised), now)
        weights = [] if self._penalties else self.penalty.squared
        each = squares_of([*gradients, *weights])
        squares, of_weights = torch.split(each, [len(gradients), len(weights)])
        penalties = self._penalties or self.penalty.sums(of_weights)
        squares = self.agreed(squares.sum(), penalties)
        self.clip(gradients, squares)
        # A loss, gradient or penalty that is not finite on any rank makes the norm non-finite on all: they
        # skip the update together, decided on the device.
        self._optimizer.found_inf = self.skipping(squares)  # type: ignore[attr-defined]
        self._optimizer.step()
        return self.outcome(penalties, now)

    def moments(self) -> list[dict[str, torch.Tensor]]:
        return [dict(self._optimizer.state[p]) for p in self._masters.values()]

    def load_moments(self, states: list[dict[str, torch.Tensor]]) -> None:
        for master, state in zip(self._masters.values(), states, strict=True):
            # Moments need the parameter's memory layout: fused kernels read both in memory order.
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


def make_optimizer(parameters: list[nn.Parameter], config: Optimizer) -> torch.optim.Optimizer:
    """The player's optimizer, to be given its rates before each step. Fused: 5-7x faster on a CPU, one launch
    on a GPU, and it skips a non-finite update on the device."""
    if config.kind == "sgd":
        return torch.optim.SGD(parameters, momentum=config.momentum, fused=True)
    if config.kind == "adamw":
        return torch.optim.AdamW(parameters, weight_decay=config.decoupled_decay, eps=config.eps, fused=True)
    return torch.optim.Adam(parameters, eps=config.eps, fused=True)


def set_rates(optimizer: torch.optim.Optimizer, now: Rates) -> None:
    """Set the optimizer's learning rate, and betas if it has any, for the next step."""
    (group,) = optimizer.param_groups
    group["lr"] = now.lr
    if "betas" in group:
        group["betas"] = now.betas


def start_momentum(optimizer: torch.optim.Optimizer, masters: Iterable[torch.Tensor]) -> None:
    """Start SGD's momentum at zero where there is none yet, which changes no update (0·μ + g = g).

    Torch allocates it uninitialised in the first step. If that update is skipped the kernel does not write
    it, and the next update would use whatever is there.
    """
    if optimizer.defaults.get("momentum"):
        for master in masters:
            state = optimizer.state[master]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(master, requires_grad=False)
