"""The local fp32 master fragment: the one abstraction that exactness depends on.

Under any strategy each rank owns some fp32 elements of each parameter. A fragment says which: `data` holds
elements `start … start + data.numel()` of the flattened whole. Penalties, norms, the moving average and
checkpoints work on fragments; a strategy only says where its fragments are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

_ROW = 1024  # elements summed in fp32 before fp64 takes over: error 1e-9 relative, at memory speed


@dataclass(frozen=True)
class Fragment:
    """This rank's part of one parameter."""

    name: str  # as in the unsharded module's named_parameters()
    start: int  # index of its first element in the flattened whole
    shape: torch.Size  # of the whole
    data: torch.Tensor  # fp32 master elements, the memory that the optimizer updates; any shape
    penalised: float  # the factor that the player's weight penalties count it with; 0: not covered


def sum_of_squares(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Σ t² over all elements of all tensors → fp64 scalar on their device; no host sync."""
    return squares_of(tensors).sum()


def squares_of(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Σ t² over the elements of each tensor → fp64 [len(tensors)] on their device; no host sync.

    Plain fp32 norms of large tensors are off by 1e-3 and depend on how a tensor is sharded. So rows are
    summed in fp32 and their sums in fp64: on a CPU 8x faster than converting every element.
    """
    if not tensors:
        return torch.zeros(0, dtype=torch.float64)
    if tensors[0].is_cuda:  # one fused launch for all tensors, accumulating in fp64
        return torch.stack(torch._foreach_norm(list(tensors), 2.0, torch.float64)).square()
    return torch.stack([_square_sum(_flat(t)) for t in tensors])


def finite(squares: torch.Tensor) -> torch.Tensor:
    """Whether a sum of squares is a number that float32 holds; no host sync. isfinite takes five launches.

    On GPUs sums of fp64 are finite far beyond that, where Adam's fp32 moments would be infinite for good.
    """
    return squares < torch.finfo(torch.float32).max


def checksum(tensors: Sequence[torch.Tensor]) -> float:
    """Changes with any single bit of fp32 tensors; a whole number that float64 holds. Waits for them."""
    total = sum(int(_flat(t).view(torch.int32).sum(dtype=torch.int64)) for t in tensors)
    return float(total % 2**52)


def magnitudes_of(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Σ |t| over the elements of each tensor → fp64 [len(tensors)] on their device; no host sync."""
    if not tensors:
        return torch.zeros(0, dtype=torch.float64)
    if tensors[0].is_cuda:
        return torch.stack(torch._foreach_norm(list(tensors), 1.0, torch.float64))
    return torch.stack([_row_norms(_flat(t), 1.0).sum() for t in tensors])


def _square_sum(flat: torch.Tensor) -> torch.Tensor:
    return _row_norms(flat, 2.0).square().sum()


def _row_norms(flat: torch.Tensor, order: float) -> torch.Tensor:
    body = flat.numel() - flat.numel() % _ROW
    rows = torch.linalg.vector_norm(flat[:body].view(-1, _ROW), ord=order, dim=1)
    tail = torch.linalg.vector_norm(flat[body:], ord=order)
    return torch.cat([rows, tail[None]]).double()


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """A view of all elements in memory order, the only flat view that channels_last tensors have."""
    if tensor.is_contiguous():
        return tensor.detach().view(-1)
    if tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor.detach().permute(0, 2, 3, 1).reshape(-1)
    return tensor.detach().reshape(-1)
