"""What changes with the number of images shown, as pure functions of it."""

from __future__ import annotations


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
