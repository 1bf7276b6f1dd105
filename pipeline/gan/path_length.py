"""Path length regularisation of G: equal steps of its latent are to change images equally (StyleGAN2).

A G offers its latent by setting `self.latent` in its forward: the tensor w, float [N, w_dim] or
[N, layers, w_dim], that its images are computed from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pipeline.gan import gradient_penalty, second_order
from pipeline.gan.noise import Stream
from pipeline.gan.precision import wide


class Mean(Protocol):
    """A moving mean that moves after the update, by what all rounds and ranks observed."""

    @property
    def value(self) -> Tensor:
        """A scalar; 0 before the first observation."""

    def observe(self, values: Tensor, decay: float) -> None:
        """values [N]: of a rank's images in one round. decay: the share of the old mean that an update
        keeps."""


@dataclass(frozen=True)
class PathLength:
    """weight · E(‖J‖ − a)², J = ∇_w ⟨G(w), y⟩ (Karras et al. 2020, StyleGAN2, section 3.2).

    y is standard normal over √(HW), drawn for each image; a is the moving mean of ‖J‖. Of w with several
    layers, ‖J‖² is the mean over layers, as in the authors' code. There a has moved before it is compared
    with, on each GPU and round by its own images; here it moves after the update by all of the batch, and y
    is a function of z, so that the training depends on neither.
    """

    weight: float
    decay: float
    factor: int = 1  # lazy regularisation: 0 where it is not due

    @property
    def twice(self) -> bool:
        """Whether G's passes are differentiated twice for it in this turn."""
        return self.factor > 0

    def __call__(self, images: Tensor, latent: Tensor, mean: Mean, z: Tensor | None = None) -> Tensor:
        """Its part of G's loss, a scalar of at least float32. images [N,C,H,W], computed from the latent.
        z: see gradient_penalty.noise."""
        if not self.factor:
            return torch.zeros((), device=images.device)
        lengths = path_lengths(images, latent, z)
        mean.observe(lengths, self.decay)
        return (self.factor * self.weight) * (lengths - mean.value).square().mean()


def path_lengths(images: Tensor, latent: Tensor, z: Tensor | None = None) -> Tensor:
    """‖J‖ [N] along random directions y, to be differentiated again."""
    y = gradient_penalty.noise(images.detach(), z, Stream.LENGTHS) / math.sqrt(images[0, 0].numel())
    J = second_order.gradient(images, latent, y)
    return gradient_penalty.root(wide(J).square().sum(-1).view(len(J), -1).mean(1))
