"""Residual G and D in the style of SNGAN (Miyato et al. 2018, app. B) and BigGAN (Brock et al. 2019, app. B).

Between 4×4 features and the image, every block doubles (G) or halves (D) the size; channels double from the
image inwards, up to eightfold. Without BigGAN's attention. G has 55 M parameters and D 51 M at 32 px and
width 288, 57 M and 55 M at 64 px and width 176. Each is a sequence of blocks, sharded one by one.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.config import Norm
from pipeline.gan.layers import (
    Activation,
    activation_layer,
    norm_layer,
    normalise_kernels,
    refuse_checkpoint,
    refuse_size,
    run_all,
)
from pipeline.gan.resample import Doubled

SIZES = (32, 64, 128, 256)
_START = 4  # pixels of the smallest features
_GAIN = math.sqrt(2)  # of kernels that read a ReLU (He et al. 2015, eq. 10)


class Generator(nn.Module):
    """G: z float [N, z_dim] and labels c int64 [N] (None if num_classes is 0) → images [N,C,H,W] in [−1, 1].

    A conditional G sees an embedding of the class beside z. depth: residual blocks per resolution. Raises
    UserError for a size it does not have.
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
        depth: int = 1,
        norm: Norm = "batch",
        dropout: float = 0.0,
        spectral_norm: bool = False,
        checkpoint: bool = False,
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        self.checkpoint = checkpoint
        if checkpoint:
            refuse_checkpoint(norm, spectral_norm)
        outwards = _channels(size, width)[::-1]
        self.embed = nn.Embedding(num_classes, z_dim) if num_classes else None  # N(0, 1), as z is
        self.project = nn.Linear(2 * z_dim if num_classes else z_dim, outwards[0] * _START**2)
        blocks: list[nn.Module] = []
        for inputs, outputs in pairwise(outwards):
            blocks += [Residual(inputs, inputs, norm, activation, dropout) for _ in range(depth - 1)]
            blocks.append(Residual(inputs, outputs, norm, activation, dropout, resample="up"))
        to_image = nn.Conv2d(outwards[-1], channels, 3, padding=1)
        head = (norm_layer(norm, outwards[-1]), activation_layer(activation), to_image, nn.Tanh())
        self.blocks = nn.Sequential(*blocks, nn.Sequential(*head))
        _initialise(self, norm)
        _normal(self.project, gain=1.0)
        _normal(to_image, gain=1.0)  # not √2: leaves tanh room on either side
        if spectral_norm:
            normalise_kernels(self)

    def forward(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        if self.embed is not None:
            z = torch.cat([z, self.embed(c)], dim=1)
        # Channels last: a view in the memory layout that convolutions prefer.
        x = self.project(z).view(z.shape[0], _START, _START, -1).permute(0, 3, 1, 2)
        return run_all(self.blocks, x, checkpoint=self.checkpoint)


class Discriminator(nn.Module):
    """D: images float [N,C,H,W] and labels c int64 [N] (None if num_classes is 0) → logits [N].

    The logit is linear in the features summed over positions; a conditional D adds their inner product with
    the class's embedding (Miyato & Koyama 2018, eq. 3). depth: residual blocks per resolution. Raises
    UserError for a size it does not have.
    """

    channels_last = True  # see images.py

    def __init__(
        self,
        *,
        size: int,
        channels: int,
        num_classes: int = 0,
        width: int = 64,
        depth: int = 1,
        norm: Norm = "batch",
        dropout: float = 0.0,
        spectral_norm: bool = False,
        checkpoint: bool = False,
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        self.checkpoint = checkpoint
        if checkpoint:
            refuse_checkpoint(norm, spectral_norm)
        *halving, last = _channels(size, width)
        blocks: list[nn.Module] = []
        for number, (inputs, outputs) in enumerate(pairwise([channels, *halving])):
            blocks.append(
                Residual(inputs, outputs, norm, activation, dropout, resample="down", of_image=number == 0)
            )
            blocks += [Residual(outputs, outputs, norm, activation, dropout) for _ in range(depth - 1)]
        blocks.append(Residual(halving[-1], last, norm, activation, dropout))
        blocks += [Residual(last, last, norm, activation, dropout) for _ in range(depth - 1)]
        self.blocks = nn.Sequential(*blocks, activation_layer(activation))
        self.to_logit = nn.Linear(last, 1)
        self.embed = nn.Embedding(num_classes, last) if num_classes else None
        _initialise(self, norm)
        _normal(self.to_logit, gain=1 / _START**2)  # it reads a sum over so many positions
        if self.embed is not None:
            nn.init.normal_(self.embed.weight, std=_std(self.to_logit.weight, 1 / _START**2))
        if spectral_norm:
            normalise_kernels(self, nn.Embedding)  # as Miyato & Koyama: all of D is Lipschitz, or none of it

    def forward(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        features = run_all(self.blocks, x, checkpoint=self.checkpoint).sum((2, 3))
        logits: Tensor = self.to_logit(features).squeeze(1)
        if self.embed is not None:
            logits = logits + (features * self.embed(c)).sum(1)
        return logits


class Residual(nn.Module):
    """x + branch(x), resampled to twice or half the size: [N, a, H, W] → [N, b, H', W'].

    Branch: (norm, activation, 3×3 convolution) twice, enlarging before the first, shrinking after the second,
    with dropout before the second. of_image: the block that sees the image, which it takes as it is.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        norm: Norm,
        activation: Activation = "relu",
        dropout: float = 0.0,
        resample: Literal["up", "down"] | None = None,
        of_image: bool = False,
    ) -> None:
        super().__init__()
        hidden = outputs if of_image else min(inputs, outputs)
        bias = norm == "none"  # a norm has its own shifts and removes those of its input
        self.norm1 = nn.Identity() if of_image else norm_layer(norm, inputs)
        self.activation1 = nn.Identity() if of_image else activation_layer(activation)
        self.conv1 = nn.Conv2d(inputs, hidden, 3, padding=1, bias=bias)
        self.norm2 = norm_layer(norm, hidden)
        self.activation2 = activation_layer(activation)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(hidden, outputs, 3, padding=1, bias=bias)
        self.match = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, bias=False)
        self.enlarge = Doubled() if resample == "up" else nn.Identity()
        self.shrink = nn.AvgPool2d(2) if resample == "down" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        branch = self.conv1(self.enlarge(self.activation1(self.norm1(x))))
        branch = self.shrink(self.conv2(self.dropout(self.activation2(self.norm2(branch)))))
        # A 1×1 convolution and resampling commute: the convolution runs where there are fewer pixels.
        out: Tensor = branch + self.enlarge(self.match(self.shrink(x)))
        return out


def _channels(size: int, width: int) -> list[int]:
    """Channels at each resolution, from the image inwards to 4×4."""
    refuse_size("resnet", size, SIZES)
    levels = int(math.log2(size // _START))
    return [width * min(2**level, 8) for level in range(levels + 1)]


def _initialise(network: nn.Module, norm: Norm) -> None:
    """Kernels normal, scaled so that features neither vanish nor explode; biases 0.

    A branch reads rectified features (gain √2), a shortcut unrectified ones (gain 1). Without a norm every
    block would double the variance: there, the branches of L blocks start at 1/√L of that, so that together
    they multiply it by e at most (Hayou et al. 2021, Stable ResNet).
    """
    blocks = [m for m in network.modules() if isinstance(m, Residual)]
    start = 1 / math.sqrt(len(blocks)) if norm == "none" else 1.0
    for block in blocks:
        _normal(block.conv1, _GAIN)
        _normal(block.conv2, _GAIN * start)
        if isinstance(block.match, nn.Conv2d):
            _normal(block.match, gain=1.0)


def _normal(layer: nn.Conv2d | nn.Linear, gain: float) -> None:
    nn.init.normal_(layer.weight, std=_std(layer.weight, gain))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _std(kernel: Tensor, gain: float) -> float:
    return gain / math.sqrt(kernel[0].numel())
