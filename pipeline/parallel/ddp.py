"""Replicated players: one process, or DistributedDataParallel over several."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.errors import CommonError, UserError
from pipeline.parallel.batch import BatchShape
from pipeline.parallel.buffers import BufferSnapshot
from pipeline.parallel.engine import PlayerSettings, poisoned
from pipeline.parallel.fragments import Fragment
from pipeline.parallel.masters import MasterEngine
from pipeline.parallel.ranks import Ranks

# The kernel of a convolution with one input channel has both memory layouts, and its gradient may have the
# other one: DDP warns that it copies these few bytes.
warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")


class ReplicatedEngine(MasterEngine):
    """Every rank holds the whole player; gradients are averaged over ranks in the last round's backward."""

    def __init__(
        self,
        module: nn.Module,
        player: PlayerSettings,
        ranks: Ranks,
        batch: BatchShape,
        example: tuple[torch.Tensor | None, ...],
    ) -> None:
        """example: inputs of a small batch, to settle DDP's buckets before a checkpoint is loaded."""
        module.to(ranks.device)
        if player.channels_last:
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        masters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        fragments = [
            Fragment(name, 0, p.shape, p.detach(), player.penalised.get(name, 0.0))
            for name, p in masters.items()
        ]
        super().__init__(module, player, ranks, batch, masters, fragments)
        self._ddp = _wrap(module) if ranks.world > 1 else None
        self._settle_buckets(example)

    @property
    def copies(self) -> int:
        return self.ranks.world

    def forward(self, *inputs: Any) -> torch.Tensor:
        wrapped: nn.Module = self._ddp or self.module
        output: torch.Tensor = wrapped(*inputs)
        return output

    def begin_turn(self) -> None:
        """Makes the gradients NaN if any penalty is not finite on this rank: all ranks then skip together, as
        the all-reduce spreads the NaN. (Sharded players agree on their gradients' norm.)"""
        super().begin_turn()
        if self._ddp is not None and not self.frozen:
            self._penalties = self.penalty.sums()
            self._loss_gradient = poisoned(self._loss_gradient, self._penalties).float()

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext() if self._ddp is None or last else self._ddp.no_sync()

    def collect_gradients(self) -> None:
        """Raises UserError if a parameter took no part: DDP has then averaged no gradient of its bucket, and
        would say so in the next update only."""
        if self._ddp is not None:
            try:
                self._ddp._check_reducer_finalized()  # type: ignore[no-untyped-call]
            except RuntimeError:
                raise UserError(
                    f"{self.player.name}: what {type(self.module).__name__} returned in this update did not "
                    "depend on all of its parameters, and ddp cannot average a missing gradient. "
                    "Let it depend on them, or train with --strategy fsdp2, zero1 or zero2."
                ) from None
        for master in self._masters.values():
            if master.grad is None:  # the loss does not depend on it, but its penalty does
                master.grad = torch.zeros_like(master)

    def _settle_buckets(self, example: tuple[torch.Tensor | None, ...]) -> None:
        """One backward whose gradients are thrown away.

        DDP regroups its gradient buckets after its first backward, which changes the order of summation over
        three or more ranks. A resumed run would regroup one step later than an unbroken one and differ in the
        last bits; now every run regroups before its first step.
        """
        if self._ddp is None:
            return
        snapshot = BufferSnapshot(self._buffers)
        with self.autocast():
            self._refuse_idle(self.module(*example))
            self.forward(*example).sum().backward()  # type: ignore[no-untyped-call]
        self.zero_grad()
        snapshot.restore()

    def _refuse_idle(self, output: torch.Tensor) -> None:
        """Raises CommonError unless the output depends on all parameters: DDP waits for every gradient."""
        gradients = torch.autograd.grad(output.sum(), list(self._masters.values()), allow_unused=True)
        idle = [name for name, found in zip(self._masters, gradients, strict=True) if found is None]
        if idle:
            more = f" and {len(idle) - 1} more" * (len(idle) > 1)
            raise CommonError(
                f"{self.player.name}: what {type(self.module).__name__} returns does not depend on its "
                f"parameter {idle[0]}{more}, and ddp cannot average a missing gradient. Remove it, "
                "freeze it (requires_grad_(False)), or train with --strategy fsdp2, zero1 or zero2."
            )


def _wrap(module: nn.Module) -> DistributedDataParallel:
    with warnings.catch_warnings():  # the successor of broadcast_buffers is not in all versions we support
        warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
        return DistributedDataParallel(
            module,
            broadcast_buffers=False,  # each rank has its own BatchNorm statistics, saved per rank
            gradient_as_bucket_view=True,
        )
