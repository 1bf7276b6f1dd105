"""Gradients that are differentiated again, in the order in which a CPU does it.

Of the nodes of a graph that are ready, autograd runs the one with the highest number, and each thread numbers
those that it makes. On a CPU all are made by one thread: those of a gradient after those of the forward pass,
so they run first, and a parameter's gradient is complete before the forward pass's nodes come to its end, at
which FSDP2 reduces. On a GPU the device's own thread makes the nodes of a gradient. Whose numbers are higher
would depend on what the process has done since its start, which is not the same on all ranks, nor in a run
that was resumed. So the device's numbers are kept ahead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_AHEAD = 2**17  # of the training thread's: for hundreds of updates, made in 0.03 s
_CLOSE = 2**15  # more than a round makes

_reached: dict[torch.device, int] = {}  # by the numbers of each device's thread, at least


def gradient(of: Tensor, by: Tensor, along: Tensor | None = None) -> Tensor:
    """Σ along · ∂of/∂by, as `by`, to be differentiated again. along: as `of`; a scalar needs none."""
    if _has_a_thread(by.device):
        _keep_ahead(by.device)
    (found,) = torch.autograd.grad(of, by, along, create_graph=True)
    return found


def _has_a_thread(device: torch.device) -> bool:
    return device.type == "cuda"


def _keep_ahead(device: torch.device) -> None:
    ours = torch._C._autograd._get_sequence_nr()
    if _reached.get(device, 0) < ours + _CLOSE:
        one = torch.ones((), device=device, requires_grad=True)
        torch.autograd.grad(_TakeNumbers.apply(one, ours + _AHEAD), one)  # type: ignore[no-untyped-call]
        _reached[device] = ours + _AHEAD


class _TakeNumbers(torch.autograd.Function):
    """The identity. Its backward, which runs in the device's thread, takes the numbers there up to `last`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, last: int) -> Tensor:
        ctx.last = last
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        for _ in range(ctx.last - torch._C._autograd._get_sequence_nr()):
            torch._C._functions.UndefinedGrad()  # takes a number
        return grads[0], None
