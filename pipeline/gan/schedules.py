"""What changes with the number of images shown, as pure functions of it."""

from __future__ import annotations


def ema_beta(images: int, kimg: float) -> float:
    """The share of the old G_ema that is kept when `images` more images have been shown to D.

    Half-life `kimg` thousand images, whatever the batch size (Karras et al. 2018, app. C, in the form of
    StyleGAN2-ADA's `ema_kimg`). kimg = 0 keeps nothing: G_ema is G.
    """
    return 0.5 ** (images / (kimg * 1000)) if kimg else 0.0
