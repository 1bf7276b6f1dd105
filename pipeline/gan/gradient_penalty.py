"""Penalties on D's gradient with respect to images: R1, R2 and WGAN-GP.

R1 and R2 are exact, by double backward, or a finite difference (`sigma` > 0), which differentiates once. An
exact one on all images takes its gradient from the forward pass of the adversarial loss; every other penalty
makes a pass of its own. The gradient is with respect to images before augmentation, through it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from pipeline.gan import second_order
from pipeline.gan.noise import Stream, keys_of, noise_like
from pipeline.gan.precision import wide

_TINY = 1e-12


@dataclass(frozen=True)
class Judged:
    """Images of one round and what D says of them."""

    images: Tensor  # [N,C,H,W], before augmentation; they require a gradient if a penalty asked for it
    logits: Tensor  # [N]
    again: Callable[[Tensor, int], Tensor]
    """(changed, k) → logits, by another pass, of changed [V·N/k,C,H,W]: V versions of every k-th image, each
    with that image's label and augmentation."""


def judge(
    D: Callable[[Tensor, Tensor | None], Tensor],
    augment: Callable[[Tensor, Tensor | None], Tensor],
    images: Tensor,
    c: Tensor | None,
    augmentation: Tensor | None,
    differentiate: bool,
) -> Judged:
    """D on images [N,C,H,W] with labels c [N], each augmented with its row of `augmentation`."""

    def again(changed: Tensor, every: int) -> Tensor:
        versions = len(changed) * every // len(images)

        def rows(given: Tensor | None) -> Tensor | None:
            return given if given is None else given[::every].repeat(versions, *[1] * (given.ndim - 1))

        return D(augment(changed, rows(augmentation)), rows(c))

    images.requires_grad_(differentiate)
    return Judged(images, D(augment(images, augmentation), c), again)


class GradientPenalty(Protocol):
    """One penalty as it counts in one turn of D."""

    @property
    def name(self) -> str:
        """As in its chart, Loss/D/{name}_penalty."""

    @property
    def gamma(self) -> float:
        """Its weight at this point of the run."""

    @property
    def twice(self) -> bool:
        """Whether D's passes are differentiated twice for it in this turn."""

    @property
    def needs(self) -> Literal["real", "fake"] | None:
        """The images whose first pass it differentiates, which must require a gradient before it."""

    def __call__(self, real: Judged, fake: Judged, mix: Tensor | None, z: Tensor | None) -> Tensor:
        """Its part of D's loss, a scalar of at least float32. mix [N]: where between the i-th fake (0) and
        the i-th real image (1) WGAN-GP looks. z: see `noise`."""


@dataclass(frozen=True)
class Slope:
    """R1 or R2: (γ/2) E‖∇D(x)‖² over real images (Mescheder et al. 2018, eq. 9) or over fakes.

    The squared norm is summed over an image's pixels and averaged over images. Under batch norm, where one
    image's logit depends on the others, the gradient is that of the sum of the logits, as is customary.

    sigma > 0: a finite difference along Gaussian noise ε in place of the gradient (Lin et al. 2025, APT):
    E (D(x + σε) − D(x))² / σ², or two-sided E (D(x + σε) − D(x − σε))² / 4σ². D's compared passes are one.
    It is an estimate. Measured at γ = 1 on D's of 28 px that the exact penalty had trained (DECISIONS.md,
    2026-11-26): one-sided, it is biased whatever the batch, 3 to 18 times too large with leaky ReLUs, and for
    a smooth D (SiLU) from σ = 0.1 on. Two-sided, value and mean gradient are right within 7 % for a smooth D
    at σ ≤ 0.1, and 6 to 40 % too small with leaky ReLUs. The gradient of one draw at one image is 25 to 60
    times as noisy as the exact mean gradient is large (√pixels is 28): in batches of fewer than about 100
    images, noise outweighs the adversarial gradient. It is proportional to γ, and to 1/√draws.
    """

    name: str
    on: Literal["real", "fake"]
    gamma: float
    factor: int = 1  # lazy regularisation: 0 where it is not due
    every: int = 1  # takes every so-many-th image
    sigma: float = 0.0
    sided: Literal[1, 2] = 2

    @property
    def twice(self) -> bool:
        return self.factor > 0 and not self.sigma

    @property
    def needs(self) -> Literal["real", "fake"] | None:
        return self.on if self.twice and self.every == 1 else None

    def __call__(
        self, real: Judged, fake: Judged, mix: Tensor | None = None, z: Tensor | None = None
    ) -> Tensor:
        judged = real if self.on == "real" else fake
        if not self.factor:
            return torch.zeros((), device=judged.logits.device)
        if self.sigma:
            squares = self._difference(judged, z).square()
        elif self.every == 1:
            squares = _squared_norms(judged.logits, judged.images)
        else:
            images = judged.images.detach()[:: self.every].requires_grad_()
            squares = _squared_norms(judged.again(images, self.every), images)
        return (0.5 * self.factor * self.gamma) * squares.mean()

    def _difference(self, judged: Judged, z: Tensor | None) -> Tensor:
        """The slope along a random direction, [N/every]."""
        images = judged.images.detach()[:: self.every]
        z = z if z is None else z[:: self.every]
        step = self.sigma * noise(images, z, Stream.REAL if self.on == "real" else Stream.FAKE)
        other = images - step if self.sided == 2 else images
        ahead, behind = wide(judged.again(torch.cat([images + step, other]), self.every)).chunk(2)
        return (ahead - behind) / (self.sided * self.sigma)


@dataclass(frozen=True)
class Interpolated:
    """WGAN-GP: weight · E(‖∇D(x̂)‖ − 1)², x̂ between the i-th real and the i-th fake image (Gulrajani et al.
    2017, eq. 3). Its pass is its own, with the real image's label and augmentation."""

    gamma: float
    name: str = "wgan_gp"
    twice: bool = True
    needs: None = None

    def __call__(self, real: Judged, fake: Judged, mix: Tensor | None, z: Tensor | None = None) -> Tensor:
        assert mix is not None
        x = real.images.detach()
        y = fake.images.detach().to(x.dtype)  # G's are bf16 under autocast
        between = y.lerp(x, mix.to(x.dtype).view(-1, 1, 1, 1)).requires_grad_()
        norms = root(_squared_norms(real.again(between, 1), between))
        return self.gamma * (norms - 1).square().mean()


def noise(images: Tensor, z: Tensor | None, stream: Stream) -> Tensor:
    """ε of the finite difference, standard normal, as images [N, …], and a function of z [N, z_dim].

    Without z, of the device's generator, which each rank and round seeds on its own: other worlds draw other
    noise.
    """
    return torch.randn_like(images) if z is None else noise_like(images, keys_of(z), stream)


def root(squares: Tensor) -> Tensor:
    """Norms from their squares, with a finite derivative at 0."""
    return (squares + _TINY).sqrt()


def _squared_norms(logits: Tensor, images: Tensor) -> Tensor:
    """‖∇D(x)‖² [N] for each image, to be differentiated again."""
    return wide(second_order.gradient(logits.sum(), images)).square().flatten(1).sum(1)
