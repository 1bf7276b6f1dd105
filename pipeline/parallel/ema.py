"""G_ema: the moving average of G's weights, kept where G's fragments are."""

from __future__ import annotations

import torch
from torch import nn

from pipeline.parallel.batch_norm import pooled_buffers
from pipeline.parallel.buffers import fill_buffers
from pipeline.parallel.engine import Engine


class Ema:
    """θ_ema ← β·θ_ema + (1−β)·θ after every update, over the fp32 master fragments of one player."""

    def __init__(self, engine: Engine, unsharded: nn.Module) -> None:
        """unsharded: a module of G's class, on the device, that `module` fills."""
        self.engine = engine
        self.averages = [f.data.clone() for f in engine.fragments]
        self._module = unsharded.requires_grad_(False).eval()
        self._whole = True
        self._release()

    def update(self, beta: float) -> None:
        """After an update of the player. beta: the share of the old average that it keeps."""
        self._release()
        torch._foreach_lerp_(self.averages, [f.data for f in self.engine.fragments], 1 - beta)

    def module(self) -> nn.Module:
        """The whole G_ema in eval mode, on every rank; collective.

        Its BatchNorm statistics are G's, pooled over all ranks. Always the same module, whose weights are
        valid until the next update.
        """
        self._whole = True
        named = dict(self._module.named_parameters())
        with torch.no_grad():
            for name, tensor in self.engine.whole(self.averages):
                named[name].data = tensor.clone(memory_format=torch.contiguous_format)
            fill_buffers(self._module, pooled_buffers(self.engine.module, self.engine.ranks))
        return self._module

    def _release(self) -> None:
        """Free the whole weights, which training does not need, but keep the module."""
        if self._whole:
            named = dict(self._module.named_parameters())
            for fragment in self.engine.fragments:
                named[fragment.name].data = named[fragment.name].new_empty(0)
            self._whole = False
