"""Grids of images: the samples of a run, and the pictures of `shardgan sample`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from pipeline.durable import whole

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}  # by the name of the file
_OPTIONS: dict[str, dict[str, Any]] = {
    "PNG": {"optimize": True},
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"lossless": True},
}
_GAP = 2  # white pixels between images and around the grid
_PLEASANT = 56  # pixels; smaller images are enlarged until no side is shorter


def tile(images: Tensor, columns: int) -> npt.NDArray[np.uint8]:
    """One picture, uint8 [H', W'] or [H', W', 3], of N ≥ 1 images uint8 [N, 1 or 3, H, W], row by row.

    Small images are enlarged to some 56 pixels; a shorter last row ends in white.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or not len(images) or images.shape[1] not in (1, 3):
        raise ValueError(f"not uint8 images [N, 1 or 3, H, W]: {images.dtype} {list(images.shape)}")
    pixels = images.permute(0, 2, 3, 1).cpu().numpy()
    count, height, width, channels = pixels.shape
    scale = _scale(min(height, width))
    pixels = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
    columns = min(columns, count)
    rows = -(-count // columns)
    step_y, step_x = height * scale + _GAP, width * scale + _GAP
    grid = np.full((rows * step_y + _GAP, columns * step_x + _GAP, channels), 255, np.uint8)
    for place, image in enumerate(pixels):
        y, x = _GAP + place // columns * step_y, _GAP + place % columns * step_x
        grid[y : y + height * scale, x : x + width * scale] = image
    return grid[:, :, 0] if channels == 1 else grid


def step_of(size: int) -> int:
    """How many pixels a row of a grid of square images of this size is high."""
    return size * _scale(size) + _GAP


def _scale(shortest: int) -> int:
    return -(-_PLEASANT // min(shortest, _PLEASANT))


def save_grid(images: Tensor, path: Path, columns: int, notes: Mapping[str, str] | None = None) -> None:
    """Write `tile(images, columns)`, whole or not at all, in the format of the path's suffix.

    notes: text stored in a PNG. Raises ValueError for a suffix that is not in FORMATS, OSError.
    """
    if (kind := FORMATS.get(path.suffix.lower())) is None:
        raise ValueError(f"{path.name} does not end in {', '.join(FORMATS)}")
    options = dict(_OPTIONS[kind])
    if kind == "PNG":
        options["pnginfo"] = info = PngInfo()
        for name, note in (notes or {}).items():
            info.add_text(name, note)
    with whole(path) as partial:
        Image.fromarray(tile(images, columns)).save(partial, format=kind, **options)
