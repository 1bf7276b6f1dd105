"""SampleGrids of images, of G_ema's and of real ones: what a person looks at first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from PIL import Image
from torch import Tensor

from pipeline.parallel.ranks import Ranks
from pipeline.run.grid import save_grid
from pipeline.run.report import Report

GRID = 64  # images on a sheet


class SampleGrids:
    """Writes `samples/` of a run folder. All ranks make the same calls, one makes the images and writes."""

    def __init__(self, folder: Path, ranks: Ranks, report: Report) -> None:
        self._folder, self._ranks, self._report = folder / "samples", ranks, report

    def fakes(self, make: Callable[[], Tensor], columns: int, cur_nimg: int) -> Tensor | None:
        """make: the images, uint8 [GRID, C, H, W], called on the one rank that writes, and returned there."""
        return self._save("Samples/fakes", make, self._free_name(cur_nimg), columns, cur_nimg)

    def reals(self, make: Callable[[], Tensor]) -> None:
        """As `fakes`, once."""
        self._save("Samples/reals", make, "reals.png", 8, 0)

    def _free_name(self, cur_nimg: int) -> str:
        """fakes<kimg>.png; if that is a sheet of another moment of this kimg, a name that sorts after it."""
        kimg, rest = divmod(cur_nimg, 1000)
        plain = f"fakes{kimg:06d}.png"
        return (
            plain if shown_at(self._folder / plain) in (None, cur_nimg) else f"fakes{kimg:06d}_{rest:03d}.png"
        )

    def _save(
        self, key: str, make: Callable[[], Tensor], name: str, columns: int, cur_nimg: int
    ) -> Tensor | None:
        path = self._folder / name
        images: Tensor | None = None
        self._report.still_ours()
        with self._ranks.raise_together():
            if self._ranks.main:
                images = make()
                notes = {"chart": key, "cur_nimg": str(cur_nimg)}  # for W&B, should it be told later
                try:
                    save_grid(images, path, columns, notes=notes)
                    self._report.image(key, path, cur_nimg)
                except OSError as error:  # a picture less is no reason to stop training
                    self._report.warn("Sheet not written", f"{path} could not be written: {error}.")
        return images


def shown_at(sheet: Path) -> int | None:
    """The cur_nimg of a sheet of a run; None if there is no such sheet."""
    try:
        with Image.open(sheet) as picture:
            return int(picture.info["cur_nimg"])
    except (OSError, KeyError, ValueError, SyntaxError):
        return None


def spread(images: Tensor) -> float:
    """How much images [N, C, H, W] differ from each other: the standard deviation of a pixel over them, on
    average."""
    return float(images.float().std(0).mean())
