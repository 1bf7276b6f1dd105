"""What the network families share: norms, activations, spectral norm, the refusal of a size."""

from __future__ import annotations

from typing import Literal

from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from pipeline.config import Norm, UserError
from pipeline.gan.penalised import KERNEL_LAYERS
from pipeline.gan.sync_batch_norm import SyncBatchNorm2d

Activation = Literal["relu", "leaky_relu", "silu"]
SLOPE = 0.2  # of leaky ReLUs (Radford et al. 2016, section 3)


def norm_layer(kind: Norm, channels: int) -> nn.Module:
    """The norm named `kind` in the config, for features [N, channels, H, W]; "none": the identity."""
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "sync_batch":
        return SyncBatchNorm2d(channels)
    if kind == "instance":
        return nn.InstanceNorm2d(channels, affine=True)
    if kind == "group":
        return nn.GroupNorm(_groups(channels), channels)
    return nn.Identity()


def activation_layer(kind: Activation) -> nn.Module:
    return {"relu": nn.ReLU(), "leaky_relu": nn.LeakyReLU(SLOPE), "silu": nn.SiLU()}[kind]


def normalise_kernels(module: nn.Module, *others: type[nn.Module]) -> None:
    """Spectral norm (Miyato et al. 2018) on every convolution and linear layer, and on layers of `others`."""
    for layer in list(module.modules()):
        if isinstance(layer, (*KERNEL_LAYERS, *others)):
            spectral_norm(layer)


def refuse_size(family: str, size: int, sizes: tuple[int, ...]) -> None:
    """Raise UserError if the family has no network for images of this size."""
    if size not in sizes:
        raise UserError(
            f"data.size={size}: {family} has no network for {size} px images, only for "
            f"{', '.join(map(str, sizes))}. Set data.size to one of them (`shardgan prepare --size` resizes "
            "images), or use a network of your own: G.kind and D.kind take package.module:Class."
        )


def _groups(channels: int) -> int:
    """The most equal groups, at most 32 (Wu & He 2018), with at least four channels each."""
    return next(n for n in range(max(1, min(32, channels // 4)), 0, -1) if channels % n == 0)
