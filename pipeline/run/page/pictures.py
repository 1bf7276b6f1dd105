"""The pictures of a page, as data URIs of WebP: a run's sample grids, and strips of them."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TypeVar

from PIL import Image

from pipeline.config import Config
from pipeline.run.saved_grids import first_images, grids_of, newest, opened, reals_of

T = TypeVar("T")

MOST = 40  # sample grids in a history
_SMALL, _LARGE = 640, 1200  # pixels: the longest side in a history, and of a picture by itself
_QUALITY = 78  # of WebP
_STRIP = 2  # rows of a sample grid


@dataclass(frozen=True)
class Picture:
    """uri: of the image, which is width x height pixels."""

    uri: str
    width: int
    height: int
    kimg: float | None = None


def history(folder: Path, most: int = MOST) -> list[Picture]:
    """A run's sample grids in order, evenly thinned out to `most`, the first and last always among them."""
    chosen = thinned(grids_of(folder), most)
    return [
        picture
        for number, (cur_nimg, path) in enumerate(chosen, 1)
        if (picture := _read(path, _LARGE if number == len(chosen) else _SMALL, cur_nimg / 1000))
    ]


def reals(folder: Path) -> Picture | None:
    """The run's grid of held-out images; None without one."""
    return _read(reals_of(folder), _LARGE)


def plotted(path: Path) -> Picture | None:
    """A drawing from a file, without loss; None if it is not there."""
    return _read(path, 2 * _LARGE, lossless=True)


def strip(folder: Path, config: Config, real: bool = False) -> Picture | None:
    """The first rows of a run's newest sample grid, or of its real images; None without one."""
    path = reals_of(folder) if real else newest(folder)
    image = None if path is None else first_images(path, config.data.size, _STRIP)
    return None if image is None else _picture(image, _SMALL)


def thinned(items: Sequence[T], most: int) -> list[T]:
    """At most so many, evenly, the first and last always among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _read(path: Path, longest: int, kimg: float | None = None, lossless: bool = False) -> Picture | None:
    image = opened(path)
    return None if image is None else _picture(image, longest, kimg, lossless)


def _picture(image: Image.Image, longest: int, kimg: float | None = None, lossless: bool = False) -> Picture:
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    image.save(data := BytesIO(), "WEBP", quality=_QUALITY, lossless=lossless)
    uri = f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"
    return Picture(uri, image.width, image.height, kimg)
