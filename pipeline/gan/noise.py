"""White noise that is a function of integers, and so the same on every device and in every world.

A generator of random numbers would draw other noise where the batch is divided among other ranks. Here each
value is a hash of the image's key, the layer and the pixel.
"""

from __future__ import annotations

import math
from enum import IntEnum

import torch
from torch import Tensor

_BITS = 23  # so many bits, and a half, are exact in float32
# 2³¹ times the fractions of the golden ratio and of √3, made odd.
_GOLDEN, _ROOT_3 = 0x4F1BBCDD, 0x5DB3D743


class Stream(IntEnum):
    """What noise of images is for, besides that of G's layers."""

    LENGTHS = 0
    REAL = 1
    FAKE = 2


def keys_of(z: Tensor) -> Tensor:
    """Latents [N, z_dim] → int64 [N] in [0, 2³²): the bits of their first elements, in float32."""
    return z[:, 0].detach().float().view(torch.int32).long() & 0xFFFFFFFF


def white_noise(keys: Tensor, layer: int, size: int) -> Tensor:
    """Standard normal float32 [N, 1, size, size], a function of each key (int64 [N] in [0, 2³²)) and of the
    layer: 0 or more."""
    return _normal(keys, layer, size * size).view(-1, 1, size, size)


def noise_like(images: Tensor, keys: Tensor, stream: Stream) -> Tensor:
    """Standard normal, as images [N, …], a function of each key and of what it is for."""
    return _normal(keys, -1 - stream, images[0].numel()).view_as(images).to(images.dtype)


def _normal(keys: Tensor, stream: int, count: int) -> Tensor:
    """float32 [N, count]."""
    streams = _hash((keys + _GOLDEN * (stream + 1)) & 0xFFFFFFFF)
    bits = _hash(streams[:, None] ^ torch.arange(count, device=keys.device)) >> (32 - _BITS)
    uniform = (bits.float() + 0.5) * 2.0 ** (1 - _BITS) - 1  # in (−1, 1), exactly
    return math.sqrt(2) * torch.erfinv(uniform)


def _hash(x: Tensor) -> Tensor:
    """A bijection of [0, 2³²) in which every bit of x moves every bit: each step is one, products with odd
    numbers included, and all products are below 2⁶³."""
    for shift, factor in ((16, _GOLDEN), (15, _ROOT_3)):
        x = ((x >> shift) ^ x) * factor & 0xFFFFFFFF
    return (x >> 16) ^ x
