"""What passes through a network change in it besides its weights: BatchNorm's running statistics and its
count of batches, spectral norm's u and v.

A pass that overflows leaves its infinities there, and the next checkpoint would be refused for them although
the update was skipped. So they are put back to where the turn began whenever its update is skipped, decided
on the device like the skipping itself.
"""

from __future__ import annotations

from collections.abc import ItemsView, Iterator
from itertools import chain

import torch
from torch import nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

Kind = tuple[torch.dtype, torch.device]


class Buffers:
    """A network's buffers, whatever tensors they are by then."""

    def __init__(self, module: nn.Module) -> None:
        # Looked up once: to walk through a network takes longer than to copy its buffers.
        self._places = [(layer._buffers, name) for layer in module.modules() for name in layer._buffers]

    def __iter__(self) -> Iterator[torch.Tensor]:
        buffers = (layer.get(name) for layer, name in self._places)
        return (buffer for buffer in buffers if buffer is not None)


class BufferSnapshot:
    """Copies of buffers, made and put back in a handful of launches however many they are: each type of them
    goes in one piece."""

    @torch.no_grad()
    def __init__(self, *buffers: Buffers) -> None:
        self._buffers = buffers
        self._copies = {kind: (_shapes(found), _in_one_piece(found)) for kind, found in self._by_kind()}

    @torch.no_grad()
    def restore(self, where: torch.Tensor) -> None:
        """Make the buffers what they were if `where`, a flag on the device, says so; no host sync. A type of
        which the network has made some anew, in another size, stays as it is."""
        for kind, found in self._by_kind():
            shapes, before = self._copies.get(kind, ([], None))
            if before is not None and shapes == _shapes(found):
                kept = torch.where(where.to(before.device), before, _in_one_piece(found))
                torch._foreach_copy_(found, _unflatten_dense_tensors(kept, found))  # type: ignore[no-untyped-call]

    def _by_kind(self) -> ItemsView[Kind, list[torch.Tensor]]:
        found: dict[Kind, list[torch.Tensor]] = {}
        for buffer in chain(*self._buffers):
            found.setdefault((buffer.dtype, buffer.device), []).append(buffer)
        return found.items()


def _shapes(tensors: list[torch.Tensor]) -> list[torch.Size]:
    return [t.shape for t in tensors]


def _in_one_piece(tensors: list[torch.Tensor]) -> torch.Tensor:
    """A copy; twice as fast as torch.cat of views."""
    flat: torch.Tensor = _flatten_dense_tensors(tensors)  # type: ignore[no-untyped-call]
    return flat.clone() if len(tensors) == 1 else flat
