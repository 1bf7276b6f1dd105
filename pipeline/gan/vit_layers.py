"""Layers of transformers on the patches of an image. A token is [width]; there are (size/patch)² of them.

Attention is torch's scaled_dot_product_attention. Its fused kernels cannot be differentiated twice: where a
penalty does that, who trains selects its plain products (`Engine.updating`), and nothing here knows of it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config import UserError

_EPS = 1e-6
_LONGEST = 10_000  # the longest wave of positions is so many times the shortest (Vaswani et al. 2017, 3.5)


def rms_norm(x: Tensor) -> Tensor:
    """x over the root mean square of its last axis (Zhang & Sennrich 2019), without a learnt scale."""
    return F.rms_norm(x, x.shape[-1:], eps=_EPS)


def positions(side: int, width: int, like: Tensor) -> Tensor:
    """Where each of side × side tokens is, [side², width], on the device of `like` and in its dtype, but at
    least float32: sines and cosines of its row in the first half of the channels, of its column in the second
    (Vaswani et al. 2017, section 3.5)."""
    angles = _angles(side, width // 4, like)
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)


def rotations(side: int, channels: int, like: Tensor, before: int = 0) -> Tensor:
    """Cosines and sines by which attention rotates queries and keys, [2, before + side², channels/2], on the
    device of `like` and in its dtype, but at least float32.

    Rotary embedding (Su et al. 2021, RoFormer, eq. 34) in two dimensions: half of the pairs of a head's
    channels turn with the token's row, half with its column. before: tokens before the image's, not rotated.
    """
    angles = F.pad(_angles(side, channels // 4, like).flatten(1), (0, 0, before, 0))
    return torch.stack([angles.cos(), angles.sin()])


def _angles(side: int, waves: int, like: Tensor) -> Tensor:
    """[side², row or column, waves]."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    frequencies = _LONGEST ** -(torch.arange(waves, device=like.device, dtype=dtype) / waves)
    place = torch.arange(side, device=like.device, dtype=dtype)
    return torch.cartesian_prod(place, place)[:, :, None] * frequencies


class Attention(nn.Module):
    """Self-attention: x [N, T, width] and rotations → [N, T, width]. Queries and keys are normalised, which
    bounds their products (Dehghani et al. 2023, ViT-22B, section 2)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        qk, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).split([2, 1])
        first, second = rms_norm(qk).chunk(2, dim=-1)
        cos, sin = rotation
        q, k = torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(v.dtype)
        mixed = F.scaled_dot_product_attention(q, k, v[0])  # [N, heads, T, width/heads]
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class SwiGLU(nn.Module):
    """out(SiLU(a) · b), a and b linear in x [N, T, width] (Shazeer 2020, eq. 6). Each is 8/3 times as wide:
    as many weights as in two layers with four times the width between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = 8 * round(width / 3)
        self.ab = nn.Linear(width, 2 * hidden)
        self.out = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.ab(x).chunk(2, dim=-1)
        out: Tensor = self.out(F.silu(a) * b)
        return out


def heads_of(width: int, heads: int | None) -> int:
    """As many as asked for, or one per 64 channels. Raises UserError for heads that do not fit."""
    heads = heads or max(1, width // 64)
    if width % (4 * heads):
        raise UserError(
            f"width={width}: vit cannot divide it into heads={heads} of a multiple of 4 channels, half of "
            f"whose pairs turn with a token's row and half with its column. Give a width that is "
            f"a multiple of {4 * heads}, or other heads."
        )
    return heads


def side_of(size: int, patch: int) -> int:
    """Patches along a side of an image. Raises UserError for patches that do not fit."""
    if size % patch:
        fitting = ", ".join(str(p) for p in range(1, math.isqrt(size) + 2) if size % p == 0)
        raise UserError(f"patch={patch} does not divide data.size={size}. Set it to {fitting} for vit.")
    return size // patch
