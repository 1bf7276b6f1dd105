"""Layers that every network family offers by the same keys: norms, activations and spectral norm."""

from __future__ import annotations

from typing import Literal

from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from pipeline.config import Norm
from pipeline.gan.penalised import KERNEL_LAYERS

Activation = Literal["relu", "leaky_relu", "silu"]
SLOPE = 0.2  # of leaky ReLUs (Radford et al. 2016, section 3)


def norm_layer(kind: Norm, channels: int) -> nn.Module:
    """The norm called `kind` in the config, for features [N, channels, H, W]; "none" passes them on."""
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "instance":
        return nn.InstanceNorm2d(channels, affine=True)
    if kind == "group":
        return nn.GroupNorm(_groups(channels), channels)
    return nn.Identity()


def activation_layer(kind: Activation) -> nn.Module:
    return {"relu": nn.ReLU(), "leaky_relu": nn.LeakyReLU(SLOPE), "silu": nn.SiLU()}[kind]


def normalise_kernels(module: nn.Module) -> None:
    """Spectral norm (Miyato et al. 2018) on every convolution and linear layer."""
    for layer in list(module.modules()):
        if isinstance(layer, KERNEL_LAYERS):
            spectral_norm(layer)


def _groups(channels: int) -> int:
    """As many equal groups as possible, 32 at most (Wu & He 2018), of four channels at least."""
    return next(n for n in range(max(1, min(32, channels // 4)), 0, -1) if channels % n == 0)
