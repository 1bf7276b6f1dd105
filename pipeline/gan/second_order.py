"""Gradients that are differentiated again, in an order that only the networks decide.

Of the nodes of a graph that are ready, autograd runs the one with the highest number, and each thread numbers
those that it makes. On a CPU all are made by one thread. On a GPU those of a forward pass are made by the
thread that trains, those of a gradient by the device's own. Whose numbers are higher would depend on what the
process has done since its start: on the main rank, which tries the networks first, not the same as on others,
which would then send in another order; and in a run that was resumed not the same as in one that was not,
which would then round otherwise. So the training thread's numbers stay ahead.
"""

from __future__ import annotations

import torch
from torch import Tensor

_AHEAD = 2**17  # of the device's: for hundreds of updates, made in 0.03 s
_CLOSE = 2**15  # more than a round makes


def gradient(of: Tensor, by: Tensor, along: Tensor | None = None) -> Tensor:
    """Σ along · ∂of/∂by, as `by`, to be differentiated again. along: as `of`; a scalar needs none."""
    (found,) = torch.autograd.grad(of, by, along, create_graph=True)
    _stay_ahead(found)
    return found


def begin(device: torch.device) -> None:
    """Before the first pass that this thread trains by."""
    one = torch.ones((), device=device, requires_grad=True)
    gradient(one * one, one)


def _stay_ahead(found: Tensor) -> None:
    node = found.grad_fn
    if node is None or not _is_numbered_by_the_device(found):
        return
    theirs, ours = node._sequence_nr(), torch._C._autograd._get_sequence_nr()
    if theirs + _CLOSE > ours:
        for _ in range(theirs + _AHEAD - ours):
            torch._C._functions.UndefinedGrad()  # takes a number


def _is_numbered_by_the_device(found: Tensor) -> bool:
    return found.is_cuda
