"""Sample grids read back from a run folder. Nothing here needs torch."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

GAP = 2  # white pixels between images and around a grid
STEP = "step"  # a note in a grid: from one row of images to the next, in pixels
MOST_PIXELS = 80_000_000  # Pillow warns above 89 million, and reads no picture of twice that
REALS = "reals.png"  # in samples/: held-out images
# A grid that cannot be read; one of too many pixels was written by a version that set no limit.
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
PLEASANT = 56  # pixels; smaller images are enlarged until no side is shorter


def grids_of(folder: Path) -> list[tuple[int, Path]]:
    """(cur_nimg, file) of a run's sample grids, in order."""
    found = [(shown_at(path), path) for path in (folder / "samples").glob("fakes*.png")]
    return sorted((cur_nimg, path) for cur_nimg, path in found if cur_nimg is not None)


def newest(folder: Path) -> Path | None:
    """A run's last sample grid; None without one."""
    return next((path for _, path in reversed(grids_of(folder))), None)


def reals_of(folder: Path) -> Path:
    """A run's grid of held-out images, which need not be there."""
    return folder / "samples" / REALS


def shown_at(path: Path) -> int | None:
    """The cur_nimg of a run's sample grid; None if there is no such grid."""
    try:
        with Image.open(path) as picture:
            return int(picture.info["cur_nimg"])
    except (*UNREADABLE, KeyError):
        return None


def opened(path: Path) -> Image.Image | None:
    """A picture in RGB; None if it cannot be read."""
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except UNREADABLE:
        return None


def first_images(path: Path, size: int, rows: int, columns: int | None = None) -> Image.Image | None:
    """The first rows of a grid, with its titles, if it has any; with columns, that many images of each row,
    without titles. size: of its images in pixels, if it was written before grids said it themselves. None if
    it cannot be read."""
    try:
        with Image.open(path) as picture:
            written, grid = picture.info.get(STEP), picture.convert("RGB")
    except UNREADABLE:
        return None
    step = int(written) if written else size * scale_of(size) + GAP
    head = (grid.height - GAP) % step  # of titles
    bottom = min(grid.height, head + rows * step + GAP)
    if columns is None:
        return grid.crop((0, 0, grid.width, bottom))
    return grid.crop((0, head, min(grid.width, columns * step + GAP), bottom))


def scale_of(shortest: int, least: int = PLEASANT) -> int:
    """How many pixels of a grid are one of an image along a side, given its shortest side."""
    return -(-least // min(shortest, least))
