"""DCGAN (Radford, Metz & Chintala 2016): 4×4 convolutions at stride 2 between 4×4 (28 px: 7×7) and the image.

At 64 px, width 64 and batch norm these are the networks commonly trained under that name: 3,576,704
parameters in G (z_dim 100, three channels) and 2,765,568 in D. Each is a sequence of blocks, sharded one by
one.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from pipeline.config import Norm, UserError
from pipeline.gan.layers import (
    SLOPE,
    Activation,
    activation_layer,
    norm_layer,
    normalise_kernels,
    refuse_size,
)
from pipeline.gan.penalised import KERNEL_LAYERS
from pipeline.gan.r3gan import Block, initialise_blocks

SIZES = (28, 32, 64, 128)
_PAPERS_STD = 0.02  # of all kernels


class Generator(nn.Module):
    """G: z float [N, z_dim] and labels c int64 [N] (None if num_classes is 0) → images [N,C,H,W] in [−1, 1].

    A conditional G sees an embedding of the class beside z. blocks: R3GAN's, in front of the first layer.
    Raises UserError for a size it does not have, and for blocks with spectral norm.
    """

    channels_last = True  # see images.py
    bounded = True  # see check_reach

    def __init__(
        self,
        *,
        z_dim: int,
        size: int,
        channels: int,
        num_classes: int = 0,
        width: int = 64,
        blocks: int = 0,
        norm: Norm = "batch",
        dropout: float = 0.0,
        spectral_norm: bool = False,
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        self.start, hidden = _start_and_hidden(size, width)
        outwards = [*reversed(hidden), channels]
        self.embed = nn.Embedding(num_classes, z_dim) if num_classes else None  # N(0, 1), as z is
        inputs = 2 * z_dim if num_classes else z_dim
        layer = Projection if blocks and norm == "none" else nn.Linear
        self.project = layer(inputs, outwards[0] * self.start**2, bias=norm == "none")
        residual = _residual(blocks, outwards[0], activation, spectral_norm)
        ups = [Up(a, b, norm, activation, dropout) for a, b in pairwise(outwards[:-1])]
        self.blocks = nn.Sequential(*residual, *ups, Up(outwards[-2], channels, norm, activation))
        _initialise(self, norm, gain=math.sqrt(2))
        if spectral_norm:
            normalise_kernels(self)

    def forward(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        if self.embed is not None:
            z = torch.cat([z, self.embed(c)], dim=1)
        x = self.project(z)
        # Channels last: a view in the memory layout that convolutions prefer.
        x = x.view(z.shape[0], self.start, self.start, -1).permute(0, 3, 1, 2)
        return torch.tanh(self.blocks(x))


class Discriminator(nn.Module):
    """D: images float [N,C,H,W] and labels c int64 [N] (None if num_classes is 0) → logits [N].

    A conditional D is a projection discriminator (Miyato & Koyama 2018, eq. 3): it adds to the logit the
    inner product of the class's embedding with the features summed over positions. blocks: R3GAN's, after the
    last layer. Raises UserError for a size it does not have, and for blocks with spectral norm.
    """

    channels_last = True  # see images.py

    def __init__(
        self,
        *,
        size: int,
        channels: int,
        num_classes: int = 0,
        width: int = 64,
        blocks: int = 0,
        norm: Norm = "batch",
        dropout: float = 0.0,
        spectral_norm: bool = False,
        activation: Activation = "leaky_relu",
    ) -> None:
        super().__init__()
        start, hidden = _start_and_hidden(size, width)
        first = Down(channels, hidden[0], "none", activation, dropout, bias=norm == "none")
        downs = [Down(a, b, norm, activation, dropout) for a, b in pairwise(hidden)]
        residual = _residual(blocks, hidden[-1], activation, spectral_norm)
        self.blocks = nn.Sequential(first, *downs, *residual)
        self.to_logit = nn.Conv2d(hidden[-1], 1, start, bias=norm == "none")
        self.embed = nn.Embedding(num_classes, hidden[-1]) if num_classes else None
        _initialise(self, norm, gain=math.sqrt(2 / (1 + SLOPE**2)))
        if self.embed is not None:
            nn.init.normal_(self.embed.weight, std=_std(self.to_logit, norm, 1.0))
        if spectral_norm:
            normalise_kernels(self, nn.Embedding)  # as Miyato & Koyama: all of D is Lipschitz, or none of it

    def forward(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        features = self.blocks(x)
        logits: Tensor = self.to_logit(features).flatten()
        if self.embed is not None:
            logits = logits + (features.sum((2, 3)) * self.embed(c)).sum(1)
        return logits


class Projection(nn.Linear):
    """gain · (Wz + b), W starting at the paper's 0.02 and the images at He's gain all the same.

    Adam's step has one size for all weights. A layer of few inputs starts with large ones: without the gain
    it would learn several times as slowly as the convolutions, and images would keep its first noise
    (configs/README.md, "At which rates?"). A learning rate multiplier: Karras et al. 2019, app. C.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__(inputs, outputs, bias)
        self.weight_gain = math.sqrt(2 / inputs) / _PAPERS_STD

    def forward(self, z: Tensor) -> Tensor:
        return self.weight_gain * super().forward(z)


class Up(nn.Module):
    """Norm, activation, dropout, transposed convolution to twice the size: [N, a, H, W] → [N, b, 2H, 2W]."""

    def __init__(
        self, inputs: int, outputs: int, norm: Norm, activation: Activation, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.norm = norm_layer(norm, inputs)
        self.activation = activation_layer(activation)
        self.dropout = nn.Dropout(dropout)
        self.conv = nn.ConvTranspose2d(inputs, outputs, 4, 2, 1, bias=norm == "none")

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(self.dropout(self.activation(self.norm(x))))
        return out


class Down(nn.Module):
    """A convolution to half the size, norm, activation, dropout: [N, a, 2H, 2W] → [N, b, H, W]."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        norm: Norm,
        activation: Activation,
        dropout: float,
        bias: bool | None = None,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 4, 2, 1, bias=norm == "none" if bias is None else bias)
        self.norm = norm_layer(norm, outputs)
        self.activation = activation_layer(activation)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.dropout(self.activation(self.norm(self.conv(x))))
        return out


def _start_and_hidden(size: int, width: int) -> tuple[int, list[int]]:
    """Pixels of the smallest feature map, and channels of each map from the image inwards."""
    refuse_size("dcgan", size, SIZES)
    start = 7 if size == 28 else 4
    levels = int(math.log2(size // start))
    return start, [width * min(2**level, 8) for level in range(levels)]


def _residual(blocks: int, channels: int, activation: Activation, spectral_norm: bool) -> list[Block]:
    if blocks and spectral_norm:
        raise UserError(
            f"blocks={blocks} with spectral_norm=true: R3GAN's blocks begin with a kernel of zeros, which no "
            "factor can normalise. Set blocks=0 or spectral_norm=false."
        )
    return [Block(channels, activation) for _ in range(blocks)]


def _initialise(module: nn.Module, norm: Norm, gain: float) -> None:
    """Kernels normal, biases 0; blocks as in R3GAN."""
    for layer in module.modules():
        if isinstance(layer, KERNEL_LAYERS):
            nn.init.normal_(layer.weight, std=_std(layer, norm, gain))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    initialise_blocks(module)


def _std(layer: nn.Module, norm: Norm, gain: float) -> float:
    """0.02 as in the paper, under batch norm and where a gain follows; else He et al. 2015's gain / √fan_in.

    At 0.02 the signal shrinks from layer to layer, more so in narrow networks. Batch norm restores it;
    without a norm images start almost grey, logits almost constant, and learning starts late. He's gain keeps
    the scale at any width; group and instance norm do not depend on it.
    """
    if norm in ("batch", "sync_batch") or isinstance(layer, Projection):
        return _PAPERS_STD
    if isinstance(layer, _ConvTransposeNd):  # with stride s, an output pixel sees k²/s² inputs per channel
        return gain / math.sqrt(layer.in_channels * math.prod(layer.kernel_size) / math.prod(layer.stride))
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return gain / math.sqrt(weight[0].numel())
