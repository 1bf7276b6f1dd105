"""A pair of transformers on patches, after GAT (Hyun et al. 2025) and AFM (Lin et al. 2025).

G turns tokens, which at first say nothing but where they are, into patches of the image. Its latent w scales
what every block reads and gates what it adds. Blocks at several depths each add an image to the output; D
sees their sum alone, so that it is an ordinary D of images. (GAT's D sees all partial sums, with noise that
falls with depth.) D reads the image's patches beside one class token, and judges by what has become of that.

Norms are affine-free. width 1152, depth 28, heads 16 on 32 px of 4 channels in patches of 2 (XL/2): G has
602 M parameters and D 447 M. Each is a sequence of blocks, sharded one by one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config import UserError
from pipeline.gan.equalised import EqualisedLinear
from pipeline.gan.layers import run
from pipeline.gan.precision import wide
from pipeline.gan.vit_layers import Attention, SwiGLU, heads_of, positions, rms_norm, rotations, side_of

# Of what a block adds, at first: gain of G's gates, and D's scale (Touvron et al. 2021, LayerScale).
_START = 0.1
# Of the layers from z to w, as a share of the learning rate (Karras et al. 2019, app. C).
_MAPPING_RATE = 0.01


def learning_rate(width: int) -> float:
    """What a pair of this width is to be trained with (GAT, width-aware scaling). Nothing applies it: it is
    for whoever writes a config."""
    return 2e-4 * 768 / width


class Generator(nn.Module):
    """G: z float [N, z_dim] and labels c int64 [N] (None if num_classes is 0) → images [N,C,H,W].

    Nothing bounds the images, as latents have no bounds. Sets `latent`, w [N, width]. depth: blocks. heads:
    None for one per 64 channels. patch: pixels along a patch. outputs: depths at which an image is added.
    checkpoint: of a block's activations, keep its inputs alone. Raises UserError for sizes that do not fit.
    """

    channels_last = True  # see images.py

    latent: Tensor

    def __init__(
        self,
        *,
        z_dim: int,
        size: int,
        channels: int,
        num_classes: int = 0,
        width: int = 64,
        depth: int = 1,
        heads: int | None = None,
        patch: int = 2,
        outputs: int = 4,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        if depth < outputs:
            raise UserError(
                f"G.depth={depth}: vit has fewer blocks than G.outputs={outputs}, the depths at which they "
                "add an image. Raise G.depth or lower G.outputs."
            )
        heads = heads_of(width, heads)
        self.side, self.width, self.checkpoint = side_of(size, patch), width, checkpoint
        self.head_channels = width // heads
        self.embed = nn.Embedding(num_classes, z_dim) if num_classes else None  # N(0, 1), as z is
        self.mapping = nn.Sequential(
            EqualisedLinear(2 * z_dim if num_classes else z_dim, width, multiplier=_MAPPING_RATE),
            nn.SiLU(),
            EqualisedLinear(width, width, multiplier=_MAPPING_RATE),
        )
        self.blocks = nn.Sequential(*(ModulatedBlock(width, heads) for _ in range(depth)))
        self.images = nn.ModuleList(ToImage(width, channels, patch, self.side) for _ in range(outputs))
        self.depths = [depth * number // outputs for number in range(1, outputs + 1)]
        _initialise(self)
        for layer in (m for m in self.modules() if isinstance(m, ModulatedBlock | ToImage)):
            nn.init.xavier_uniform_(layer.modulation.weight, gain=_START)

    def forward(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        z = rms_norm(z)
        if self.embed is not None:
            z = torch.cat([z, rms_norm(self.embed(c))], dim=1)
        w = self.latent = self.mapping(z)
        rotation = rotations(self.side, self.head_channels, z)
        x = positions(self.side, self.width, z).expand(z.shape[0], -1, -1)
        images: list[Tensor] = []
        for depth, block in enumerate(self.blocks, start=1):
            x = run(block, x, w, rotation, checkpoint=self.checkpoint)
            if depth in self.depths:
                images.append(wide(self.images[len(images)](x, w)))
        return torch.stack(images).sum(0)


class ModulatedBlock(nn.Module):
    """x + gate · attention(scaled norm of x), then the same with an MLP: x [N, T, width], w [N, width] and
    rotations → x's shape. Gates and scales are linear in SiLU(w) (Peebles & Xie 2023, DiT, adaLN)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 4 * width)
        self.attention = Attention(width, heads)
        self.mlp = SwiGLU(width)

    def forward(self, x: Tensor, w: Tensor, rotation: Tensor) -> Tensor:
        scale, gate, mlp_scale, mlp_gate = self.modulation(F.silu(w))[:, None].chunk(4, dim=-1)
        x = x + gate * self.attention(rms_norm(x) * (1 + scale), rotation)
        out: Tensor = x + mlp_gate * self.mlp(rms_norm(x) * (1 + mlp_scale))
        return out


class ToImage(nn.Module):
    """Tokens x [N, side², width] and w [N, width] → the image [N, C, H, W] of which each token is a patch."""

    def __init__(self, width: int, channels: int, patch: int, side: int) -> None:
        super().__init__()
        self.patch, self.side = patch, side
        self.modulation = nn.Linear(width, width)
        self.pixels = nn.Linear(width, channels * patch**2)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        pixels = self.pixels(rms_norm(x) * (1 + self.modulation(F.silu(w))[:, None]))
        return F.pixel_shuffle(pixels.transpose(1, 2).unflatten(2, (self.side, self.side)), self.patch)


class Discriminator(nn.Module):
    """D: images float [N,C,H,W] and labels c int64 [N] (None if num_classes is 0) → logits [N].

    The logit is linear in the class token; a conditional D adds the token's inner product with the class's
    embedding (Miyato & Koyama 2018, eq. 3). Arguments as of G. Raises UserError for sizes that do not fit.
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
        heads: int | None = None,
        patch: int = 2,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        heads = heads_of(width, heads)
        self.side, self.width, self.checkpoint = side_of(size, patch), width, checkpoint
        self.patch, self.head_channels = patch, width // heads
        self.from_pixels = nn.Linear(channels * patch**2, width)
        self.token = nn.Parameter(torch.empty(width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.to_logit = nn.Linear(width, 1)
        self.embed = nn.Embedding(num_classes, width) if num_classes else None
        _initialise(self)
        nn.init.normal_(self.token, std=0.02)
        for kernel in (self.to_logit.weight, *([] if self.embed is None else [self.embed.weight])):
            nn.init.normal_(kernel, std=1 / math.sqrt(width))

    def forward(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        rotation = rotations(self.side, self.head_channels, x, before=1)
        x = self.from_pixels(F.pixel_unshuffle(x, self.patch).flatten(2).transpose(1, 2))
        x = x + positions(self.side, self.width, x)
        x = torch.cat([self.token.expand(len(x), 1, -1), x], dim=1)
        for block in self.blocks:
            x = run(block, x, rotation, checkpoint=self.checkpoint)
        features = rms_norm(x[:, 0])
        logits: Tensor = self.to_logit(features).squeeze(1)
        if self.embed is not None:
            logits = logits + (features * self.embed(c)).sum(1)
        return logits


class Block(nn.Module):
    """x + scale · attention(norm of x), then the same with an MLP: x [N, T, width] and rotations → x's shape.
    The scales are learnt, one per channel."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.mlp = SwiGLU(width)
        self.scale = nn.Parameter(torch.empty(width))
        self.mlp_scale = nn.Parameter(torch.empty(width))
        nn.init.constant_(self.scale, _START)
        nn.init.constant_(self.mlp_scale, _START)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        x = x + self.scale * self.attention(rms_norm(x), rotation)
        out: Tensor = x + self.mlp_scale * self.mlp(rms_norm(x))
        return out


def _initialise(network: nn.Module) -> None:
    """Linear kernels uniform (Glorot & Bengio 2010), biases 0."""
    for layer in (m for m in network.modules() if isinstance(m, nn.Linear)):
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
