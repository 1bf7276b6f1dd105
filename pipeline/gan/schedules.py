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

    return Now(
        G=rates(config.optim.G, config.penalty.G),
        D=rates(config.optim.D, config.penalty.D),
        gradient_penalties=tuple(_gradient_penalties(config, cur_nimg)),
        path=_path(config, cur_nimg) if config.penalty.path.weight else None,
        ema_beta=ema_beta(config.images_per_update, half_life(config, cur_nimg)),
        augment_p=now(config.augment.p or 0.0),
    )


def scheduled(value: Schedulable, cur_nimg: int, burn_in_kimg: float) -> float:
    """The value after cur_nimg images: of [from, to], half a cosine's way over burn_in_kimg thousand images,
    then `to` (Huang et al. 2024, R3GAN, app. D)."""
    if not isinstance(value, tuple):
        return value
    share = 0.5 * (1 + math.cos(math.pi * min(cur_nimg / (1000 * burn_in_kimg), 1.0)))
    return share * value[0] + (1 - share) * value[1]


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


def half_life(config: Config, cur_nimg: int) -> float:
    """That of G_ema in images, in the update that begins after cur_nimg images.

    It is `ema.kimg` thousand, whatever the batch size (Karras et al. 2018, app. C), but at most `ema.rampup`
    times cur_nimg: else G_ema would long be little but G's first weights. Both are in the form of
    StyleGAN2-ADA's `ema_kimg` and `ema_rampup`; rampup = 0 sets no limit, nor does a scheduled `ema.kimg`
    have one.
    """
    kimg, rampup = config.ema.kimg, config.ema.rampup
    images = 1000 * scheduled(kimg, cur_nimg, config.run.burn_in_kimg)
    return min(images, rampup * cur_nimg) if rampup and not isinstance(kimg, tuple) else images


def ema_beta(images: int, half_life: float) -> float:
    """The share of the old G_ema that an update keeps which shows `images` images to D; half_life, too, is in
    images. One of 0 keeps nothing, and G_ema becomes G."""
    return 0.5 ** (images / half_life) if half_life else 0.0


def charts(config: Config, cur_nimg: int, augment_p: float) -> dict[str, float]:
    """Chart → value of what may be scheduled, where it is used; augment_p may be adaptive."""
    now = at(config, cur_nimg)
    found = {}
    for player, rates in (("G", now.G), ("D", now.D)):
        optimizer: Optimizer = getattr(config.optim, player)
        penalty: WeightPenalty = getattr(config.penalty, player)
        found[f"Progress/{player}/lr"] = rates.lr
        found |= {f"Progress/{player}/beta2": rates.betas[1]} if optimizer.kind != "sgd" else {}
        found |= {f"Progress/{player}/l2": rates.l2} if is_used(penalty.l2) else {}
        found |= {f"Progress/{player}/l1": rates.l1} if is_used(penalty.l1) else {}
    found |= {"Progress/augment_p": augment_p} if config.augment.ops else {}
    found |= {f"Progress/{p.name}_gamma": p.gamma for p in now.gradient_penalties if isinstance(p, Slope)}
    return found | (
        {"Progress/ema_kimg": half_life(config, cur_nimg) / 1000} if is_used(config.ema.kimg) else {}
    )
