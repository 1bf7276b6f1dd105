"""Differentiable augmentation of all that D sees, real images and fakes alike.

So that G need not learn to make augmented images, each operation is off with probability 1 − p (Karras et al.
2020, "Training GANs with limited data", ADA): up to p of about 0.8 the distribution of augmented images still
determines that of the images. Strengths are ADA's, where it has the operation:

    flip     mirrored left to right, half of the time
    shift    by whole pixels, uniform in ±1/8 of the size
    scale    times 2^N(0, 0.2²)
    rotate   by any angle
    colour   brightness + N(0, 0.2²), contrast × 2^N(0, 0.5²), saturation × 2^N(0, 1), in this order; the last
             does nothing to images of one channel
    cutout   a square of half the size, its centre uniform over the image, becomes grey (0)

Beyond its border an image is continued by reflection. ADA's low-pass filters around the resampling are left
out: it is bilinear, in one go for the first four operations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

OPS = ("flip", "shift", "scale", "rotate", "colour", "cutout")  # in the order in which they are applied
_GEOMETRY = frozenset(OPS[:4])


class Augmentation:
    """Some of the operations, for images of one size."""

    columns = 12
    """Parameters of an image: the matrix (4) and translation (2) from its pixels to where they are sampled;
    gain, gain of the mean over channels, offset; half the side of the square cut out, and its centre (2)."""

    def __init__(self, ops: Iterable[str], size: int) -> None:
        """ops: of OPS. size: height = width of the images, at least 2."""
        self._ops, self._size = frozenset(ops), size

    numbers = len(OPS) + 10
    """Drawn per image: whether each operation is on, and what it does."""

    def parameters(self, numbers: Tensor, p: float) -> Tensor:
        """Parameters of n images, float32 [n, columns], of numbers float64 [n, numbers] in [0, 1).

        What an operation would do to an image depends on neither p nor the other operations; p decides how
        many are on.
        """
        on = {op: (coin < p) & (op in self._ops) for op, coin in zip(OPS, numbers.T[: len(OPS)], strict=True)}
        flip, right, down, scale, angle, brightness, contrast, saturation, x, y = numbers.T[len(OPS) :]
        most = self._size / 8
        mirror = torch.where(on["flip"] & (flip < 0.5), -1.0, 1.0)
        zoom = _if(on["scale"], 2 ** (0.2 * _normal(scale)), 1.0)
        turn = _if(on["rotate"], math.tau * angle, 0.0)
        cos, sin = turn.cos() / zoom, turn.sin() / zoom
        centre = (self._size - 1) / 2
        gain = _if(on["colour"], 2 ** (0.5 * _normal(contrast)), 1.0)
        vivid = _if(on["colour"], 2 ** _normal(saturation), 1.0)
        parameters = [
            # The inverse of the operations: rotation, scale, shift, flip.
            *(mirror * cos, mirror * sin, -sin, cos),
            centre - mirror * _if(on["shift"], (most * (2 * right - 1)).round(), 0.0),
            centre - _if(on["shift"], (most * (2 * down - 1)).round(), 0.0),
            *(gain * vivid, gain * (1 - vivid), gain * _if(on["colour"], 0.2 * _normal(brightness), 0.0)),
            torch.where(on["cutout"], self._size / 4, 0.0),
            *(self._size * (place - 0.5) for place in (x, y)),
        ]
        return torch.stack(parameters, dim=1).float()

    def __call__(self, images: Tensor, parameters: Tensor | None) -> Tensor:
        """images [N,C,H,W] in [-1, 1], each transformed by its row of parameters [N,columns], on one device.

        None changes nothing. The same shape and dtype; computed in float32 at least, and differentiable with
        respect to the images any number of times. Colours may leave [-1, 1]. An operation that is off leaves
        an image as it is, bit for bit, and so do flips and shifts with the values that they move.
        """
        if parameters is None:
            return images
        dtype = torch.promote_types(images.dtype, torch.float32)
        out, parameters = images.to(dtype), parameters.to(dtype)
        if self._ops & _GEOMETRY:
            out = _resample(out, parameters[:, :4].view(-1, 2, 2), parameters[:, 4:6])
        if "colour" in self._ops:
            gain, grey, offset = parameters[:, 6:9, None, None, None].unbind(1)
            out = torch.addcmul(torch.addcmul(offset, out, gain), out.mean(1, keepdim=True), grey)
        if "cutout" in self._ops:
            cut = _square(self._size, parameters[:, 9:10], parameters[:, 10:12])
            out = torch.where(cut, 0.0, out)
        return out.to(images.dtype)


def _resample(images: Tensor, matrix: Tensor, translation: Tensor) -> Tensor:
    """images [N,C,H,W] sampled where matrix [N,2,2] and translation [N,2] say, bilinearly.

    A pixel at (x, y) from the centre becomes what is at matrix · (x, y) + translation from the upper left
    one. In these units, unlike those of grid_sample, places of whole pixels are exact. Elementwise, as
    autocast and TF32 would round a matrix product.
    """
    (count, channels, size, _), last = images.shape, images.shape[2] - 1
    x = torch.arange(-last / 2, size / 2, device=images.device, dtype=images.dtype)
    of_x, of_y = matrix[:, None, None].unbind(-1)
    places = torch.addcmul(
        torch.addcmul(translation[:, None, None], of_x, x[:, None]), of_y, x[:, None, None]
    )
    places = last - (places.remainder(2 * last) - last).abs()  # reflected about the centres of border pixels
    low = places.floor()
    right, below = (places - low)[..., None, :].unbind(-1)
    ends = torch.stack([low, (low + 1).clamp(max=last)]).long()  # [2,N,H,W,2]
    first = torch.arange(0, count * size * size, size * size, device=images.device)[:, None, None]
    index = (first + size * ends[..., 1])[:, None] + ends[..., 0]  # [upper lower, left right, N,H,W]
    pixels = _rows(images.permute(0, 2, 3, 1).reshape(-1, channels), index)
    across = torch.lerp(pixels[:, 0], pixels[:, 1], right)
    return torch.lerp(across[0], across[1], below).permute(0, 3, 1, 2)


def _rows(rows: Tensor, index: Tensor) -> Tensor:
    """rows [M,C] at index […] → […,C].

    A resumed run must end with the same bits, so the gradient has to be added up in a fixed order. On CUDA
    that of an embedding is, and those of index_select, gather and grid_sample are not. On a CPU all are, and
    index_select is the faster one.
    """
    if rows.is_cuda:
        return F.embedding(index, rows)
    return rows.index_select(0, index.flatten()).view(*index.shape, -1)


def _square(size: int, half: Tensor, centre: Tensor) -> Tensor:
    """bool [N,1,H,W]: pixels less than half [N,1] from centre [N,2], which is relative to the image's."""
    x = torch.arange(-(size - 1) / 2, size / 2, device=half.device, dtype=half.dtype)
    across, down = ((x - centre[..., None]).abs() < half[..., None]).unbind(1)
    return (across[:, None] & down[..., None])[:, None]


def _if(on: Tensor, value: Tensor, otherwise: float) -> Tensor:
    return torch.where(on, value, otherwise)


def _normal(uniform: Tensor) -> Tensor:
    """Standard normal numbers from those uniform in [0, 1)."""
    normal: Tensor = torch.special.ndtri(uniform.clamp(min=2**-53))
    return normal
