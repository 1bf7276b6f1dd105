"""What several runs make, side by side, between real images and their scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import UserError
from pipeline.run.comparison import references_apart, settings_apart
from pipeline.run.curves import wrapped
from pipeline.run.history import History
from pipeline.run.panels import label_of
from pipeline.run.saved_grids import first_images, newest, reals_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

MOST = 12  # runs in a picture
_SETTINGS = 2  # that a title names
_LETTERS = 36  # of a line of a title
_LARGE = 30  # up to so many are written large
_SIDE = 6  # images along a side of each panel
_ACROSS = 4  # panels beside each other, at most
_WIDTH, _HEIGHT, _DPI = 3.0, 3.5, 100  # inches of a panel


def draw(histories: Sequence[History]) -> Figure:
    """A panel for each run: its newest sample grid under the settings that set it apart. If all runs are
    scored against the same images, real ones come first, and each run's last scores are below its grid.

    Raises UserError if there are more than MOST runs, or none of them has a sample grid.
    """
    from matplotlib.figure import Figure  # here, as it takes a second to import

    if len(histories) > MOST:
        raise UserError(f"At most {MOST} runs fit into a picture, not {len(histories)}.")
    images = [_images(history, newest(history.folder)) for history in histories]
    if not any(images):
        raise UserError("There is nothing to draw: the runs have no sample grids yet.")
    titles, scores = _titles(histories), [""] * len(histories)
    panels = []
    if not references_apart(histories):
        scored = next((history for history in histories if history.reference), histories[0])
        panels.append((_images(scored, reals_of(scored.folder)), "real images", ""))
        scores = [_scores(history) for history in histories]
    panels += zip(images, titles, scores, strict=True)
    rows = -(-len(panels) // _ACROSS)
    across = -(-len(panels) // rows)
    figure = Figure(figsize=(_WIDTH * across, _HEIGHT * rows), dpi=_DPI, layout="constrained")
    places = figure.subplots(rows, across, squeeze=False).flatten()
    for axes in places:
        axes.axis("off")
    for axes, panel in zip(places, panels, strict=False):
        _draw(axes, *panel)
    return figure


def _images(history: History, grid: Path | None) -> Image | None:
    size = history.settings.get("data.size")
    return first_images(grid, size, _SIDE, _SIDE) if grid and isinstance(size, int) else None


def _titles(histories: Sequence[History]) -> list[str]:
    """What sets each run apart; its name where that is nothing or too much."""
    apart = settings_apart(histories)
    if not 0 < len(apart) <= _SETTINGS:
        return [history.name for history in histories]
    return [", ".join(f"{key} = {values[i]}" for key, values in apart.items()) for i in range(len(histories))]


def _scores(history: History) -> str:
    last = [(label_of(chart), history.last(chart)) for chart in history.leading_scores]
    return ", ".join(f"{label} {score.value:.3g}" for label, score in last if score)


def _draw(axes: Axes, image: Image | None, title: str, scores: str) -> None:
    if image is None:
        axes.text(0.5, 0.5, "no sample grid", ha="center", va="center", transform=axes.transAxes)
    else:
        axes.imshow(image)
    title = wrapped(title, _LETTERS)
    axes.set_title(title, fontsize=11 if max(map(len, title.splitlines()), default=0) <= _LARGE else 9)
    axes.text(0.5, -0.03, scores, ha="center", va="top", fontsize=11, transform=axes.transAxes)
