"""Families of networks in the parity matrix: what the cases of each differ by from the base config."""

from __future__ import annotations

from collections.abc import Mapping

PATH = ("penalty.path.weight=0.3", "penalty.path.interval=2", "penalty.path.decay=0.5")
_PAIRS = ("data.conditional=true", "loss.kind=relativistic")
_R3GAN = "width: 5, max_width: 16, activation: silu"
_STYLEGAN2 = "width: 5, max_width: 8, activation: silu"
_VIT = "width: 8, depth: 2, heads: 2, patch: 7, checkpoint: true"


def networks(module: str, prefix: str = "") -> tuple[str, ...]:
    return (f"G.kind={module}:{prefix}Generator", f"D.kind={module}:{prefix}Discriminator")


def slopes(*keys: str) -> tuple[str, ...]:
    """Keys of both R1 and R2."""
    return tuple(f"penalty.{name}.{key}" for name in ("r1", "r2") for key in keys)


def _pair(family: str, G: str, D: str) -> tuple[str, ...]:
    """G and D with these options, with labels and relativistic pairs."""
    return (*networks(f"pipeline.gan.{family}"), f"G.options={{{G}}}", f"D.options={{{D}}}", *_PAIRS)


CASES: Mapping[str, tuple[str, ...]] = {
    "r3gan": (*_pair("r3gan", _R3GAN, _R3GAN), *slopes("gamma=0.7", "interval=1")),
    "stylegan2": (  # L2 on kernels times a constant; noise as soon as it has a strength
        *_pair("stylegan2", f"{_STYLEGAN2}, mapping: 2, mixing: 0.5", _STYLEGAN2),
        *(*slopes("gamma=0.7", "interval=1"), *PATH, "penalty.l2=0.05"),
    ),
    "vit": (*_pair("vit", f"{_VIT}, outputs: 2", _VIT), *PATH, *slopes("gamma=0.7", "interval=1")),
    "vit-difference": (
        *_pair("vit", f"{_VIT}, outputs: 2", _VIT),
        *slopes("gamma=0.7", "sigma=0.3", "interval=1"),
    ),
}
