"""curve.png: the scores of the candidates, and images that each one's G makes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError

from launch.select.choice import PAIRED, Row, ScoreTable
from pipeline.data.index import load_index
from pipeline.data.plan import split_of
from pipeline.data.stream import heldout_batches
from pipeline.gan.draws import Draws
from pipeline.run.curves import wrapped
from pipeline.run.evaluate import from_latents
from pipeline.run.export import load_generator
from pipeline.run.grid import tile
from pipeline.run.images import images_of, made_at_once
from pipeline.run.panels import far_apart, label_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CPU = torch.device("cpu")
INK, DARK, LIGHT, GREY, MARK = "#222222", "#1f4e79", "#9bb7d4", "#999999", "#c05020"
_UNDER, _BESIDE = (3, 5), (12, 1)  # columns and rows of a candidate's images
MOST = 12  # candidates of a search in a picture


def new_figure(width: float, height: float) -> Figure:
    """An empty one; width, height: in inches, of which matplotlib can draw 595 at this resolution."""
    from matplotlib.figure import Figure

    return Figure(figsize=(min(width, 400), min(height, 400)), dpi=110, layout="constrained")


def numbers(rows: Sequence[Row]) -> list[float]:
    """The values of a grid over one number; empty for anything else."""
    found = [row.arm.number(key) for row in rows for key in row.arm.values]
    one = all(len(row.arm.values) == 1 for row in rows)
    return [x for x in found if x is not None] if one and None not in found else []


def readable(axes: Axes, means: Sequence[float], upright: bool = True, lowest: float = math.inf) -> None:
    """In log if means are far apart, unless the lowest of all that is drawn has no logarithm."""
    if far_apart(means) and lowest > 0:
        (axes.set_yscale if upright else axes.set_xscale)("log")
        label_log(axes, upright)


def curve(table: ScoreTable) -> Figure:
    """The values of one number from left to right, with images underneath; anything else from top to bottom,
    with room for names, and images on the right."""
    rows = table.shown(MOST)
    upright = bool(numbers(rows))
    if upright:
        rows = [rows[i] for i in np.argsort(numbers(rows), kind="stable")]
    names = [wrapped(row.arm.label, 12 if upright else 34) for row in rows]
    figure, axes, panels = _layout(len(rows), upright)
    _draw_scores(axes, table, rows, upright)
    _label(axes, table, rows, names, upright)
    once = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend([*once.values()], [*once], loc="outside upper left", ncols=3, fontsize=8, frameon=False)
    shape = _UNDER if upright else _BESIDE
    titles = [*(names if upright else [""] * len(rows)), "real images"]
    strips = [*(_images(row, shape) for row in rows), _reals(rows[0], shape)]
    for panel, title, strip in zip(panels, titles, strips, strict=True):
        if strip is None:
            panel.text(0.5, 0.5, "not there", ha="center", va="center", fontsize=8, color=INK)
        else:
            panel.imshow(strip, cmap="gray", vmin=0, vmax=255)
        panel.set_title(title, fontsize=8, color=INK, loc="center" if upright else "left", pad=3)
        panel.axis("off")
        panel.set_anchor("N" if upright else "W")
    return figure


def _layout(count: int, upright: bool) -> tuple[Figure, Axes, list[Axes]]:
    """The figure, the axes of the scores, and those of images: one per candidate, one for real images."""
    if upright:
        figure = new_figure(max(7, 1.1 * (count + 1)), 6.2)
        cells = figure.add_gridspec(2, count + 1, height_ratios=[1.45, 1])
        axes = figure.add_subplot(cells[0, :-1])
        return figure, axes, [figure.add_subplot(cells[1, i]) for i in range(count + 1)]
    figure = new_figure(12, 1.4 + 0.62 * (count + 1))
    cells = figure.add_gridspec(count + 1, 2, width_ratios=[1, 1.25])
    axes = figure.add_subplot(cells[:-1, 0])
    return figure, axes, [figure.add_subplot(cells[i, 1]) for i in range(count + 1)]


def _draw_scores(axes: Axes, table: ScoreTable, rows: list[Row], upright: bool) -> None:
    """Candidates evenly at 0, 1, …, as values of λ mostly are even in log, and one may be 0."""
    best, choice = table.minimum, table.choice
    compared = [row.arm for row in table.comparable]
    paired = table.rule == PAIRED

    def points(places: Sequence[float], scores: Sequence[float], style: str, **look: Any) -> None:
        axes.plot(*((places, scores) if upright else (scores, places)), style, **look)

    def bar(place: float, row: Row, error: float, **look: Any) -> None:
        if upright and math.isfinite(error):
            axes.errorbar(place, row.mean, yerr=error, fmt="none", **look)
        elif math.isfinite(error):
            axes.errorbar(row.mean, place, xerr=error, fmt="none", **look)

    if upright:
        points(range(len(rows)), [row.mean for row in rows], "-", color=DARK, lw=1, zorder=0)
    for place, row in enumerate(rows):
        colour = DARK if row.arm in compared else GREY
        scores = [o.score for o in row.outcomes]
        points([place] * len(scores), scores, "o", ms=4, color=LIGHT, zorder=3, label="trial")
        bar(place, row, row.error, capsize=4, color=colour, zorder=1)
        label = "mean ± standard error" if row.arm in compared else "not compared: trials are missing"
        points([place], [row.mean], "o", ms=6, color=colour, zorder=3, label=label)
        if best and table.penalty and paired and row.arm in compared and row.arm != best.arm:
            label = "± standard error of the difference\nfrom the best mean, in pairs"
            look = {"elinewidth": 6, "alpha": 0.5, "color": MARK, "zorder": 2}
            bar(place, row, row.against(best)[1], label=label, **look)
        if choice and row.arm == choice.arm:
            points([place], [row.mean], "o", ms=13, mfc="none", mec=MARK, zorder=4, label="chosen")
    if best and table.penalty and not math.isnan(best.error):
        line, span = (axes.axhline, axes.axhspan) if upright else (axes.axvline, axes.axvspan)
        line(best.mean, color=MARK, lw=0.8, ls="--", label="best mean")
        label = "best mean + its standard error"
        span(best.mean, best.mean + best.error, color=MARK, alpha=0.12, lw=0, zorder=0, label=label)


def _label(axes: Axes, table: ScoreTable, rows: list[Row], names: list[str], upright: bool) -> None:
    means, title = [row.mean for row in rows], table.rows[0].arm.title
    of_scores, of_names = (axes.yaxis, axes.xaxis) if upright else (axes.xaxis, axes.yaxis)
    readable(axes, means, upright, min(o.score for row in rows for o in row.outcomes))
    of_scores.set_label_text(f"{table.score} on held-out images")
    of_names.set_ticks(range(len(rows)), names, fontsize=8 if upright else 9)
    if upright:
        of_names.set_label_text(title)
        axes.set_xlim(-0.5, len(rows) - 0.5)
        return
    axes.set_ylim(len(rows) - 0.5, -0.5)
    if title != "candidate":
        axes.set_title(title, fontsize=9, color=INK, loc="left")


def _images(row: Row, shape: tuple[int, int]) -> NDArray[np.uint8] | None:
    """What G_ema of a candidate's first trial makes of the same latents; None without a checkpoint."""
    try:
        G, config, state = load_generator(row.outcomes[0].trial.folder)
    except (OSError, ValueError, SafetensorError):
        return None
    z, c = Draws(0, config.G.z_dim, state.label_frequencies).grid(shape[0] * shape[1])
    images, at_once = images_of(config.data, _CPU), made_at_once(config.data.size, config.data.batch_gpu)
    return tile(from_latents(G, z, c, _CPU, images, at_once)(0, len(z)), shape[0])


def _reals(row: Row, shape: tuple[int, int]) -> NDArray[np.uint8] | None:
    """Held-out images of the same trial; None if the data are no longer there."""
    config, count = row.outcomes[0].trial.config, shape[0] * shape[1]
    assert config.data.train is not None
    try:
        index = load_index(config.data.train)
        plan = split_of(config, index).heldout()
        batch, _ = next(heldout_batches(index, plan, config.data, batch=count, limit=count))
    except (OSError, ValueError):
        return None
    return tile(images_of(config.data, _CPU)(batch.images), shape[0])
