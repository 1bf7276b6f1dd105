"""Families of networks in the parity matrix: what the case of each differs by from the base config."""

from __future__ import annotations

from collections.abc import Mapping

_PAIRS = (
    *("data.conditional=true", "loss.kind=relativistic"),
    *(f"penalty.{name}.{key}" for name in ("r1", "r2") for key in ("gamma=0.7", "interval=1")),
)
PATH = ("penalty.path.weight=0.3", "penalty.path.interval=2", "penalty.path.decay=0.5")


def _networks(family: str, G: str, D: str) -> tuple[str, ...]:
    """Smooth activations, for the reason that `Case.config` gives."""
    module = f"pipeline.gan.{family}"
    return (
        *(f"G.kind={module}:Generator", f"G.options={{{G}, activation: silu}}"),
        *(f"D.kind={module}:Discriminator", f"D.options={{{D}, activation: silu}}"),
    )


CASES: Mapping[str, tuple[str, ...]] = {
    "stylegan2": (  # L2 on kernels times a constant; noise as soon as it has a strength
        *_networks(
            "stylegan2", G="width: 5, max_width: 8, mapping: 2, mixing: 0.5", D="width: 5, max_width: 8"
        ),
        *(*_PAIRS, *PATH, "penalty.l2=0.05"),
    ),
}
