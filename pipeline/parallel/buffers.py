"""Buffers that forward passes update: BatchNorm's running statistics and counts, spectral norm's u and v.

A pass that overflows leaves infinities in them, and no checkpoint may hold any. So a skipped update restores
them to what they were at the beginning of the turn, decided on the device like the skipping itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import is_

import torch
from torch import nn


class Buffers:
    """A network's buffers on the device it trains on, whichever tensors they are at the moment."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        # Looked up once: walking through a network takes longer than copying its buffers.
        self._places = [(layer._buffers, name) for layer in module.modules() for name in layer._buffers]
        self._found: list[torch.Tensor | None] = []
        self._memory: list[torch.Tensor] = []
        self._nothing = torch.empty(0, dtype=torch.uint8, device=device)

    def memory(self) -> list[torch.Tensor]:
        """For every place of a buffer its bytes, uint8 [n], as a view; empty where there is no buffer."""
        found = [layer.get(name) for layer, name in self._places]
        if len(found) != len(self._found) or not all(map(is_, found, self._found)):
            self._found, self._memory = found, [self._bytes(buffer) for buffer in found]
        return self._memory

    def _bytes(self, buffer: torch.Tensor | None) -> torch.Tensor:
        if buffer is None or buffer.device.type != self._nothing.device.type or not _dense(buffer):
            return self._nothing
        return buffer.as_strided((buffer.numel(),), (1,)).view(torch.uint8)


@torch.no_grad()
def fill_buffers(network: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Copy buffers of another network of this class. One that has come or grown in its passes stays out."""
    for name, buffer in network.named_buffers():
        if name in values and values[name].shape == buffer.shape:
            buffer.copy_(values[name])


class BufferSnapshot:
    """A copy of buffers, made and restored in a few launches, however many buffers and types there are."""

    @torch.no_grad()
    def __init__(self, *networks: Buffers) -> None:
        self._networks = networks
        memory = self._memory()
        self._sizes, self._before = _sizes(memory), torch.cat(memory) if any(map(len, memory)) else None

    @torch.no_grad()
    def restore(self, unless: torch.Tensor | None = None) -> None:
        """Restore the buffers unless `unless`, a flag on the device, is true; no host sync. A buffer replaced
        by one of another size stays as it is."""
        before, now = self._before, self._memory()
        if before is None:
            return
        if _sizes(now) != self._sizes:
            pairs = zip(torch.split(before, self._sizes), now, strict=True)
            same = [(old, new) for old, new in pairs if len(old) == len(new)]
            before, now = torch.cat([old for old, _ in same]), [new for _, new in same]
        restored = before if unless is None else torch.where(unless, torch.cat(now), before)
        torch._foreach_copy_(now, torch.split(restored, _sizes(now)))

    def _memory(self) -> list[torch.Tensor]:
        return [piece for network in self._networks for piece in network.memory()]


def _sizes(pieces: list[torch.Tensor]) -> list[int]:
    return [len(piece) for piece in pieces]


def _dense(tensor: torch.Tensor) -> bool:
    """Whether its elements fill its memory without gaps or overlaps, in any order of the axes."""
    return tensor.is_contiguous() or torch.empty_like(tensor).stride() == tensor.stride()
