"""R3GAN's networks (Huang et al. 2024, "The GAN is dead; long live the GAN!"), without norms.

Residual blocks with grouped convolutions and bilinear resampling between 4×4 features (28 px: 7×7) and the
image. Channels double from the image inwards, up to max_width. The published networks have depth 2, z_dim 64
and, of (width, max_width), (96, 768) for FFHQ-256, (384, 768) for FFHQ-64, (768, 768) for CIFAR-10 and
(1536, 1536) for ImageNet. Each is a sequence of blocks, sharded one by one.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.gan.grouped_conv import GroupedConv2d
from pipeline.gan.layers import SLOPE, Activation, activation_layer, run_all, start_and_widths
from pipeline.gan.resample import enlarge, shrink

SIZES = (28, 32, 64, 128, 256, 512, 1024)
_GROUP = 16  # channels of a group of the grouped convolutions, in at most …
_GROUPS = 96  # … so many groups


class Generator(nn.Module):
    """G: z float [N, z_dim] and labels c int64 [N] (None if num_classes is 0) → images [N,C,H,W].

    Images are not bounded: that real ones are in [−1, 1] is learnt. A conditional G sees an embedding of
    the class beside z. depth: blocks per resolution. Raises UserError for a size it does not have.
    """

    channels_last = True  # see images.py

    def __init__(
        self,
        *,
        z_dim: int,
        size: int,
        channels: int,
        num_classes: int = 0,
        width: int = 64,
        max_width: int = 512,
        depth: int = 1,
        checkpoint: bool = False,
        activation: Activation = "leaky_relu",
    ) -> None:
        super().__init__()
        self.checkpoint = checkpoint
        start, inwards = start_and_widths("r3gan", size, SIZES, width, max_width)
        outwards = inwards[::-1]
        self.embed = nn.Embedding(num_classes, z_dim) if num_classes else None
        self.project = nn.Linear(2 * z_dim if num_classes else z_dim, outwards[0], bias=False)
        self.basis = Basis(outwards[0], start)
        blocks: list[nn.Module] = [Block(outwards[0], activation) for _ in range(depth)]
        for a, b in pairwise(outwards):
            blocks.append(nn.Sequential(Resampled("up", a, b), Block(b, activation)))
            blocks += [Block(b, activation) for _ in range(depth - 1)]
        to_image = nn.Conv2d(outwards[-1], channels, 1, bias=False)
        self.blocks = nn.Sequential(*blocks[:-1], nn.Sequential(blocks[-1], to_image))
        _initialise(self)
        nn.init.normal_(self.basis.weight)

    def forward(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        if self.embed is not None:
            z = torch.cat([z, self.embed(c)], dim=1)
        x = self.basis.spread(self.project(z)).contiguous(memory_format=torch.channels_last)
        return run_all(self.blocks, x, checkpoint=self.checkpoint)


class Discriminator(nn.Module):
    """D: images float [N,C,H,W] and labels c int64 [N] (None if num_classes is 0) → logits [N].

    A conditional D's logit is the inner product of features and the class's embedding, without a part that
    all classes share. depth: blocks per resolution. Raises UserError for a size it does not have.
    """

    channels_last = True  # see images.py

    def __init__(
        self,
        *,
        size: int,
        channels: int,
        num_classes: int = 0,
        width: int = 64,
        max_width: int = 512,
        depth: int = 1,
        checkpoint: bool = False,
        activation: Activation = "leaky_relu",
    ) -> None:
        super().__init__()
        self.checkpoint = checkpoint
        start, inwards = start_and_widths("r3gan", size, SIZES, width, max_width)
        of_image = nn.Conv2d(channels, inwards[0], 1, bias=False)
        blocks: list[nn.Module] = [nn.Sequential(of_image, Block(inwards[0], activation))]
        blocks += [Block(inwards[0], activation) for _ in range(depth - 1)]
        for a, b in pairwise(inwards):
            blocks.append(nn.Sequential(Resampled("down", a, b), Block(b, activation)))
            blocks += [Block(b, activation) for _ in range(depth - 1)]
        self.blocks = nn.Sequential(*blocks)
        last = inwards[-1]
        self.basis = Basis(last, start)
        self.project = nn.Linear(last, last if num_classes else 1, bias=False)
        self.embed = nn.Embedding(num_classes, last) if num_classes else None
        _initialise(self)
        if self.embed is not None:
            nn.init.normal_(self.embed.weight, std=1 / math.sqrt(num_classes * last))

    def forward(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        x = run_all(self.blocks, x, checkpoint=self.checkpoint)
        features: Tensor = self.project(self.basis.gather(x))
        if self.embed is None:
            return features.squeeze(1)
        logits: Tensor = (features * self.embed(c)).sum(1)
        return logits


class Block(nn.Module):
    """x + branch(x), [N, C, H, W]: 1×1 to twice the channels, 3×3 in groups, 1×1 back, a biased activation
    after the first two. Does nothing when new, as its last kernel is zero (Zhang et al. 2019, Fixup).
    """

    def __init__(self, channels: int, activation: Activation) -> None:
        super().__init__()
        hidden = 2 * channels
        self.expand = nn.Conv2d(channels, hidden, 1)
        self.mix = GroupedConv2d(hidden, hidden, 3, padding=1, groups=_groups(hidden))
        self.reduce = nn.Conv2d(hidden, channels, 1, bias=False)
        self.activation = activation_layer(activation)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.activation(self.mix(self.activation(self.expand(x))))
        out: Tensor = x + self.reduce(branch)
        return out


class Resampled(nn.Module):
    """Twice or half the size, [N, a, H, W] → [N, b, H', W'], with a 1×1 convolution if channels change: where
    there are fewer pixels, which makes no difference otherwise."""

    def __init__(self, way: Literal["up", "down"], inputs: int, outputs: int) -> None:
        super().__init__()
        self.up = way == "up"
        self.match = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = enlarge(self.match(x)) if self.up else self.match(shrink(x))
        return out


class Basis(nn.Module):
    """A learnt image per channel, [C, size, size]: G's features begin as its multiples, and D's end as inner
    products with it. That is a convolution of each channel, transposed in G, so `weight` is a kernel."""

    weight_gain = 1.0

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, size, size))

    def spread(self, factors: Tensor) -> Tensor:
        """[N, C] → [N, C, size, size]."""
        return factors[:, :, None, None] * self.weight.to(factors.dtype)

    def gather(self, features: Tensor) -> Tensor:
        """[N, C, size, size] → [N, C]."""
        return (features * self.weight).sum((2, 3))


def initialise_blocks(network: nn.Module) -> None:
    """Kernels normal, scaled so that the branches of all of the network's blocks together neither shrink nor
    blow up the signal in training (Fixup: by L^(−1/4) for L branches of three layers); their last zero."""
    blocks = [m for m in network.modules() if isinstance(m, Block)]
    gain = math.sqrt(2 / (1 + SLOPE**2)) * len(blocks) ** -0.25 if blocks else 1.0
    for block in blocks:
        for layer in (block.expand, block.mix):
            _normal(layer.weight, gain)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(block.reduce.weight)


def _initialise(network: nn.Module) -> None:
    """Blocks as above; all else so that it keeps the variance of what it reads."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear | Basis):
            _normal(layer.weight, gain=1.0)
        elif isinstance(layer, nn.Embedding):  # as a linear layer that reads one-hot labels
            nn.init.normal_(layer.weight, std=1 / math.sqrt(layer.num_embeddings))
    initialise_blocks(network)


def _normal(weight: Tensor, gain: float) -> None:
    nn.init.normal_(weight, std=gain / math.sqrt(weight[0].numel()))


def _groups(channels: int) -> int:
    """As many equal groups as there may be, of at least _GROUP channels."""
    return next(n for n in range(max(1, min(_GROUPS, channels // _GROUP)), 0, -1) if channels % n == 0)
