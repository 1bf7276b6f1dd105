"""Singular values of a player's largest kernels, from a checkpoint of any strategy, on one process."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.run.checkpoint import Pieces


def spectra(checkpoint: Path, player: str, network: nn.Module, largest: int = 3) -> dict[str, Tensor]:
    """{kernel: its singular values, the greatest first} of the `largest` kernels by elements, as matrices of
    their first axis by all others. network: tells the shapes; may be on the meta device.

    What a weight penalty does shows here: L2 shrinks all directions in proportion, and those that the loss
    does not hold up vanish.
    """
    pieces = Pieces(checkpoint, player)
    shapes = {name: p.shape for name, p in network.named_parameters() if p.ndim > 1}
    kernels = sorted(shapes.keys() & pieces.names(), key=lambda name: (-shapes[name].numel(), name))
    return {
        name: torch.linalg.svdvals(
            pieces("weights", name, 0, shapes[name].numel()).view(shapes[name]).flatten(1)
        )
        for name in kernels[:largest]
    }
