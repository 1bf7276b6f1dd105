"""Truncation: less variety for better images, in families whose images are computed from a latent w."""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor, nn

from pipeline.config import UserError
from pipeline.gan.draws import derive_seed

SAMPLES = 10_000  # latents whose mean is w̄


class Mapped(Protocol):
    """A G in two parts."""

    def mapping(self, z: Tensor, c: Tensor | None) -> Tensor:
        """z [N, z_dim] and labels → w [N, w_dim]."""

    def synthesis(self, w: Tensor) -> Tensor:
        """w [N, w_dim] → images [N, C, H, W]."""


class Truncated:
    """A G whose images are of w̄ + ψ(w − w̄) (Karras et al. 2019, StyleGAN, appendix B); ψ = 1: of w itself.

    w̄ is the mean of w over 10,000 fixed z; with labels, of the image's class, so that truncated images stay
    in it. It is computed here, once, and stored nowhere: a mean that follows training is another on every
    rank.
    """

    def __init__(self, G: nn.Module, psi: float) -> None:
        """G: whole and in eval mode, such as G_ema. Raises UserError if it has no mapping and synthesis."""
        if not (callable(getattr(G, "mapping", None)) and callable(getattr(G, "synthesis", None))):
            raise UserError(
                "Truncation needs a G with a latent w: this one has no mapping(z, c) and synthesis(w), as "
                "stylegan2 has."
            )
        self._G, self._psi = cast(Mapped, G), psi
        self._means: dict[int | None, Tensor] = {}

    @torch.no_grad()
    def __call__(self, z: Tensor, c: Tensor | None) -> Tensor:
        """z [N, z_dim] and labels [N] → images [N, C, H, W]."""
        w = self._G.mapping(z, c)
        if c is None:
            centre = self._mean(z, None)
        else:
            classes, place = torch.unique(c, return_inverse=True)
            centre = torch.stack([self._mean(z, int(label)) for label in classes])[place]
        return self._G.synthesis(centre + self._psi * (w - centre))

    def _mean(self, like: Tensor, label: int | None) -> Tensor:
        """w̄ [w_dim], of one class if there are labels."""
        if label not in self._means:
            generator = torch.Generator().manual_seed(derive_seed("truncation"))
            z = torch.randn(SAMPLES, like.shape[1], generator=generator).to(like)
            c = None if label is None else torch.full((SAMPLES,), label, device=like.device)
            self._means[label] = self._G.mapping(z, c).mean(0)
        return self._means[label]
