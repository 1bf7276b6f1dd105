"""Sample grids of G_ema and of real images: what a person looks at first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from pipeline.durable import write
from pipeline.gan.draws import Draws
from pipeline.parallel.ranks import Ranks
from pipeline.run.grid import LATEST, column_titles, save_grid, whole_rows
from pipeline.run.heldout import HeldOutImages
from pipeline.run.images import Images
from pipeline.run.report import Report
from pipeline.run.saved_grids import MOST_PIXELS, REALS, shown_at

GRID = 64  # images in a grid, of which whole rows are shown: as many as fit into …


class SampleGrids:
    """Writes `samples/` of a run folder. All ranks make the same calls; the main one does the work."""

    def __init__(self, folder: Path, ranks: Ranks, report: Report, names: Sequence[str] = ()) -> None:
        """names: of the classes."""
        self._folder, self._ranks, self._report, self._names = folder / "samples", ranks, report, names

    def fakes(self, make: Callable[[], Tensor], draws: Draws, cur_nimg: int) -> Tensor | None:
        """make: the images of `draws.grid(GRID)`, uint8 [GRID, C, H, W]; called on the main rank, and
        returned there. The last grid is LATEST too."""
        return self._save("Samples/fakes", make, self._free_name(cur_nimg), draws, cur_nimg)

    def reals(self, heldout: HeldOutImages, images: Images, draws: Draws, cur_nimg: int) -> None:
        """Held-out images, of a new run or where no grid shows these: where classes have columns, in the same
        ones, white where there is none."""
        labels = draws.grid(GRID)[1] if self._titles(draws) else None

        def make() -> Tensor:
            if labels is None:
                return images(heldout.some(GRID))
            found, there = heldout.of_classes(labels)
            shown = images(found)
            shown[~there] = 255
            return shown

        self._save("Samples/reals", make, REALS, draws, cur_nimg)

    def _titles(self, draws: Draws) -> tuple[str, ...]:
        return column_titles(draws.grid(GRID)[1], draws.grid_columns(GRID), self._names)

    def _free_name(self, cur_nimg: int) -> str:
        """fakes<kimg>.png; if that is an earlier grid of this kimg, a name that sorts after it."""
        kimg, rest = divmod(cur_nimg, 1000)
        plain = f"fakes{kimg:06d}.png"
        return (
            plain if shown_at(self._folder / plain) in (None, cur_nimg) else f"fakes{kimg:06d}_{rest:03d}.png"
        )

    def _save(
        self, key: str, make: Callable[[], Tensor], name: str, draws: Draws, cur_nimg: int
    ) -> Tensor | None:
        path, columns = self._folder / name, draws.grid_columns(GRID)
        images: Tensor | None = None
        self._report.still_ours()
        with self._ranks.raise_together():
            if self._ranks.main and (name != REALS or not (cur_nimg and path.exists())):
                images = make()
                fit = max(1, MOST_PIXELS // images.shape[-2:].numel())
                shown = images[: whole_rows(min(len(images), fit), columns)]
                notes = {"chart": key, "cur_nimg": str(cur_nimg)}  # if it is sent to W&B later
                try:
                    save_grid(shown, path, columns, self._titles(draws), notes)
                    if name != REALS:
                        write(self._folder / LATEST, path.read_bytes())
                    self._report.image(key, path, cur_nimg)
                except OSError as error:  # no reason to stop training
                    self._report.warn("Sample grid not written", f"{path} could not be written: {error}.")
        return images


def spread(images: Tensor) -> float:
    """How much images [N, C, H, W] differ: the standard deviation of a pixel over them, on average."""
    return float(images.float().std(0).mean())
