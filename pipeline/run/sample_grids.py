"""Sample grids of G_ema and of real images: what a person looks at first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from PIL import Image
from torch import Tensor

from pipeline.parallel.ranks import Ranks
from pipeline.run.grid import save_grid
from pipeline.run.report import Report

GRID = 64  # images in a grid


class SampleGrids:
    """Writes `samples/` of a run folder. All ranks make the same calls; the main one does the work."""

    def __init__(self, folder: Path, ranks: Ranks, report: Report) -> None:
        self._folder, self._ranks, self._report = folder / "samples", ranks, report

    def fakes(self, make: Callable[[], Tensor], columns: int, cur_nimg: int) -> Tensor | None:
        """make: the images, uint8 [GRID, C, H, W]; called on the main rank, and returned there."""
        return self._save("Samples/fakes", make, self._free_name(cur_nimg), columns, cur_nimg)

    def reals(self, make: Callable[[], Tensor]) -> None:
        """As `fakes`, once."""
        self._save("Samples/reals", make, "reals.png", 8, 0)

    def _free_name(self, cur_nimg: int) -> str:
        """fakes<kimg>.png; if that is an earlier grid of this kimg, a name that sorts after it."""
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
                notes = {"chart": key, "cur_nimg": str(cur_nimg)}  # if it is sent to W&B later
                try:
                    save_grid(images, path, columns, notes=notes)
                    self._report.image(key, path, cur_nimg)
                except OSError as error:  # no reason to stop training
                    self._report.warn("Sample grid not written", f"{path} could not be written: {error}.")
        return images


def shown_at(path: Path) -> int | None:
    """The cur_nimg of a run's sample grid; None if there is no such grid."""
    try:
        with Image.open(path) as picture:
            return int(picture.info["cur_nimg"])
    except (OSError, KeyError, ValueError, SyntaxError):
        return None


def spread(images: Tensor) -> float:
    """How much images [N, C, H, W] differ: the standard deviation of a pixel over them, on average."""
    return float(images.float().std(0).mean())
