"""A second network of the same weights, and weights laid out for shards."""

from __future__ import annotations

import copy

import torch
from torch import nn


def whole_copy(network: nn.Module) -> nn.Module:
    """A copy of a network that no strategy has wrapped yet. copy.deepcopy alone fails for tensors without
    memory (launch/doctor/memory.py), and for those that a module computes from its parameters and keeps, as
    torch.nn.utils.weight_norm does."""
    computed = (t for m in network.modules() for t in vars(m).values() if isinstance(t, torch.Tensor))
    copies: dict[int, torch.Tensor] = {id(t): t.detach().clone() for t in (*network.buffers(), *computed)}
    copies |= {
        id(p): nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format), p.requires_grad)
        for p in network.parameters()
    }
    return copy.deepcopy(network, copies)


def lay_out(network: nn.Module) -> None:
    """Make parameters contiguous, in place: FSDP2 and DeepSpeed take no others. A class of the user's may
    convert itself to channels last, or start from a transposed matrix."""
    for parameter in network.parameters():
        parameter.data = parameter.data.contiguous()
