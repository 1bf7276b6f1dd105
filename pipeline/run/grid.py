"""Grids of images: the samples of a run, and the pictures of `shardgan sample`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from pipeline.config import UserError
from pipeline.durable import whole
from pipeline.run.saved_grids import GAP, PLEASANT, STEP, scale_of

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}  # by the name of the file
LATEST = "latest.png"  # in samples/ of a run: a copy of the last grid, for a viewer that stays open
_LARGEST = {".jpg": 65_500, ".jpeg": 65_500, ".webp": 16_383, ".gif": 65_535}  # pixels along a side
_OPTIONS: dict[str, dict[str, Any]] = {
    "PNG": {"optimize": True},
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"lossless": True},
}


def tile(
    images: Tensor, columns: int, titles: Sequence[str] = (), least: int = PLEASANT
) -> npt.NDArray[np.uint8]:
    """One picture, uint8 [H', W'] or [H', W', 3], of N ≥ 1 images uint8 [N, 1 or 3, H, W], row by row.

    titles: above the columns. Images with a side shorter than `least` pixels are enlarged; a shorter last
    row ends in white.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or not len(images) or images.shape[1] not in (1, 3):
        raise ValueError(f"not uint8 images [N, 1 or 3, H, W]: {images.dtype} {list(images.shape)}")
    pixels = images.permute(0, 2, 3, 1).cpu().numpy()
    count, height, width, channels = pixels.shape
    scale = scale_of(min(height, width), least)
    pixels = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
    columns = min(columns, count)
    rows = -(-count // columns)
    step_y, step_x = height * scale + GAP, width * scale + GAP
    grid = np.full((rows * step_y + GAP, columns * step_x + GAP, channels), 255, np.uint8)
    for place, image in enumerate(pixels):
        y, x = GAP + place // columns * step_y, GAP + place % columns * step_x
        grid[y : y + height * scale, x : x + width * scale] = image
    if titles:
        head = _head(titles, step_x, grid.shape[1])
        grid = np.concatenate([np.broadcast_to(head[:, :, None], (*head.shape, channels)), grid])
    return grid[:, :, 0] if channels == 1 else grid


def _head(titles: Sequence[str], step: int, width: int) -> npt.NDArray[np.uint8]:
    """The line above a grid, uint8 [height, width]: each title in the middle of its `step` pixels, and cut
    where it is longer."""
    size = max(11, step // 16)
    font = _font(titles, size)
    head = Image.new("L", (width, size + 5), 255)
    draw = ImageDraw.Draw(head)
    for column, title in enumerate(titles):
        text = title
        while len(text) > 1 and draw.textlength(text, font) > step - GAP:
            text = text.removesuffix("…")[:-1] + "…"
        left = GAP + column * step + (step - GAP - draw.textlength(text, font)) / 2
        draw.text((left, size + 2), text, fill=0, font=font, anchor="ls")
    return np.asarray(head)


def _font(titles: Sequence[str], size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Pillow's own, which is narrow; where it may lack letters, such as Greek, that of matplotlib."""
    if all(map(str.isascii, titles)):
        return ImageFont.load_default(size)
    import matplotlib  # takes a moment

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


def whole_rows(count: int, columns: int) -> int:
    """How many of `count` images fill rows of so many columns, or one shorter row."""
    return max(count - count % columns, min(count, columns))


def column_titles(c: Tensor | None, columns: int, names: Sequence[str]) -> tuple[str, ...]:
    """The class of each column, where classes differ between columns and nowhere within one; else ()."""
    if c is None or len(c) < columns or len(set(c[:columns].tolist())) < columns or columns < 2:
        return ()
    if not torch.equal(c, c[torch.arange(len(c)) % columns]):
        return ()
    return tuple(names[int(label)] for label in c[:columns])


def fitting(picture: npt.NDArray[np.uint8], path: Path) -> npt.NDArray[np.uint8]:
    """The picture. Raises UserError if it is larger than a file of the path's suffix can be."""
    height, width = picture.shape[:2]
    largest = _LARGEST.get(path.suffix.lower())
    if largest is not None and max(height, width) > largest:
        raise UserError(
            f"{path}: a picture of {width:,} × {height:,} pixels is too large for {path.suffix}, which has "
            f"at most {largest:,} along a side. Use .png, fewer seeds, or --images for separate files."
        )
    return picture


def save_grid(
    images: Tensor,
    path: Path,
    columns: int,
    titles: Sequence[str] = (),
    notes: Mapping[str, str] | None = None,
) -> None:
    """Write `tile(images, columns, titles)`, whole or not at all, in the format of the path's suffix.

    notes: text stored in a PNG. Raises ValueError for a suffix that is not in FORMATS, UserError as
    `fitting`, OSError.
    """
    if (kind := FORMATS.get(path.suffix.lower())) is None:
        raise ValueError(f"{path.name} does not end in {', '.join(FORMATS)}")
    options = dict(_OPTIONS[kind])
    if kind == "PNG":
        options["pnginfo"] = info = PngInfo()
        step = images.shape[-2] * scale_of(min(images.shape[-2:])) + GAP
        for name, note in {STEP: str(step), **(notes or {})}.items():
            info.add_text(name, note)
    picture = Image.fromarray(fitting(tile(images, columns, titles), path))
    with whole(path) as partial:
        picture.save(partial, format=kind, **options)
