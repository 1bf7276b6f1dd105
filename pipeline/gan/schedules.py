"""What an update depends on besides weights and data, as pure functions of the images shown before it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pipeline.config import R1, Config, Optimizer, Schedulable, WeightPenalty
from pipeline.gan.gradient_penalty import GradientPenalty, Interpolated, Slope
from pipeline.gan.path_length import PathLength


@dataclass(frozen=True)
class Rates:
    """What one player steps with."""

    lr: float
    betas: tuple[float, float]
    l2: float  # λ of λ‖W‖²
    l1: float  # λ of λ‖W‖₁


@dataclass(frozen=True)
class Now:
    """All that depends on progress."""

    G: Rates
    D: Rates
    gradient_penalties: tuple[GradientPenalty, ...]  # D's, those that are not due included
    path: PathLength | None  # G's, also if it is not due; None without one
    ema_beta: float  # share of the old G_ema that an update keeps
    augment_p: float  # probability of each operation; 0 without any, and where p is adaptive

    def differentiates(self, images: str) -> bool:
        """Whether a penalty that is due takes the gradient of D's pass on "real" or "fake" images."""
        return any(penalty.needs == images for penalty in self.gradient_penalties)


def at(config: Config, cur_nimg: int) -> Now:
    """What a config says for the update, or the turn of D, that begins after cur_nimg images."""

    def now(value: Schedulable) -> float:
        return scheduled(value, cur_nimg, config.run.burn_in_kimg)

    def rates(optimizer: Optimizer, penalty: WeightPenalty) -> Rates:
        betas = now(optimizer.betas[0]), now(optimizer.betas[1])
        return Rates(now(optimizer.lr), betas, now(penalty.l2), now(penalty.l1))

    kimg = config.ema.kimg
    rampup = 0.0 if isinstance(kimg, tuple) else config.ema.rampup
    return Now(
        G=rates(config.optim.G, config.penalty.G),
        D=rates(config.optim.D, config.penalty.D),
        gradient_penalties=tuple(_gradient_penalties(config, cur_nimg)),
        path=_path(config, cur_nimg) if config.penalty.path.weight else None,
        ema_beta=ema_beta(config.images_per_update, now(kimg), rampup, cur_nimg),
        augment_p=now(config.augment.p or 0.0),
    )


def scheduled(value: Schedulable, cur_nimg: int, burn_in_kimg: float) -> float:
    """The value after cur_nimg images: of [from, to], half a cosine's way over burn_in_kimg thousand images,
    then `to` (Huang et al. 2024, R3GAN, app. D)."""
    if not isinstance(value, tuple):
        return value
    start, end = value
    progress = min(cur_nimg / (1000 * burn_in_kimg), 1.0)
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress)) if progress < 1 else end


def is_used(weight: Schedulable) -> bool:
    """Whether a weight, or either end of its schedule, is not 0."""
    return any(weight) if isinstance(weight, tuple) else weight > 0


def _gradient_penalties(config: Config, cur_nimg: int) -> Iterator[GradientPenalty]:
    penalty = config.penalty
    if is_used(penalty.r1.gamma):
        yield _slope("r1", "real", penalty.r1, config, cur_nimg)
    if is_used(penalty.r2.gamma):
        yield _slope("r2", "fake", penalty.r2, config, cur_nimg)
    if penalty.wgan_gp.weight:
        yield Interpolated(penalty.wgan_gp.weight)


def _slope(name: str, on: Literal["real", "fake"], given: R1, config: Config, cur_nimg: int) -> Slope:
    return Slope(
        name,
        on,
        gamma=scheduled(given.gamma, cur_nimg, config.run.burn_in_kimg),
        factor=lazy_factor(given.interval, cur_nimg // config.data.batch_size),
        every=round(1 / given.fraction),
        sigma=given.sigma,
        sided=given.sided,
    )


def _path(config: Config, cur_nimg: int) -> PathLength:
    given = config.penalty.path
    # G's turn begins after the images of its own update's D steps.
    factor = lazy_factor(given.interval, cur_nimg // config.images_per_update - 1)
    return PathLength(given.weight, given.decay, factor)


def lazy_factor(interval: int, update: int) -> int:
    """Lazy regularisation (Karras et al. 2020, app. B): `interval` in every interval-th update of a player,
    else 0."""
    return 0 if update % interval else interval


def ema_beta(images: int, kimg: float, rampup: float, cur_nimg: int) -> float:
    """The share of the old G_ema that an update keeps which shows `images` images to D.

    The half-life is `kimg` thousand images, whatever the batch size (Karras et al. 2018, app. C), but at most
    `rampup` times cur_nimg, the images shown before the update: else G_ema would long be little but G's
    first weights. Both are in the form of StyleGAN2-ADA's `ema_kimg` and `ema_rampup`; rampup = 0 sets no
    limit. A half-life of 0 keeps nothing, and G_ema becomes G: with kimg = 0 always, with a ramp-up in the
    first update.
    """
    half_life = min(1000 * kimg, rampup * cur_nimg) if rampup else 1000 * kimg
    return 0.5 ** (images / half_life) if half_life else 0.0
