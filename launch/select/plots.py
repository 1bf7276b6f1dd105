"""The pictures of a selection, of which this draws weights.png: the weights of the candidates."""

from __future__ import annotations

import math
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from launch.select import files
from launch.select.choice import SEARCHED, Row, ScoreTable
from launch.select.curve import MOST, curve, new_figure
from launch.select.heat import heat
from launch.select.learning import learning
from launch.select.legend import height, legend_below, styles
from launch.select.searched import searched
from pipeline.run.curves import wrapped
from pipeline.run.panels import label_log
from pipeline.run.rows import rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURES = ("curve.png", "weights.png", "grid.png", "learning.png", "search.png")
_LETTERS = 190  # of names beside each other


def draw(folder: Path, table: ScoreTable) -> list[Path]:
    """Each with what it takes: grid.png two keys, learning.png scores along the way, search.png a search. An
    earlier one, of what is no longer there, is removed.

    Returns what was written. Raises UserError if it cannot be.
    """
    pictures = {folder / "curve.png": curve(table), folder / "weights.png": weights(table)}
    if table.plane:
        pictures[folder / "grid.png"] = heat(table)
    if len(table.by_budget) > 1:
        pictures[folder / "learning.png"] = learning(table)
    if table.rule == SEARCHED:
        pictures[folder / "search.png"] = searched(table)
    for path, figure in pictures.items():
        figure.savefig(png := BytesIO(), format="png")
        files.write(path, png.getvalue())
    for name in PICTURES:
        if folder / name not in pictures:
            (folder / name).unlink(missing_ok=True)
    return list(pictures)


def weights(table: ScoreTable) -> Figure:
    """Per player: norms of kernels over training, the penalty's share of the gradient, and one spectrum."""
    rows = table.shown(MOST)
    figure = new_figure(12, 6.5 + height(rows, _LETTERS))
    lines: list[Any] = []
    for player, panels in zip("GD", figure.subplots(2, 3), strict=True):
        norms, shares, spectrum = panels
        kernels = set()
        for row, style in zip(rows, styles(rows), strict=True):
            ticks = _metrics(row)
            kimg = [tick["cur_nimg"] / 1000 for tick in ticks]
            for chart in [chart for chart in ticks[-1] if chart.startswith(f"Weights/{player}/norm/")]:
                norms.plot(kimg, [tick.get(chart, math.nan) for tick in ticks], lw=1, **style)
            share = [tick.get(f"Gradients/{player}/penalty_share", math.nan) for tick in ticks]
            lines += shares.plot(kimg, share, **style)
            kernel, values = _largest_spectrum(row, player)
            kernels |= {kernel} - {""}
            spectrum.plot(range(1, len(values) + 1), values, **style)
        which = wrapped(kernels.pop(), 40) if len(kernels) == 1 else "each one's largest kernel"
        norms.set(title=f"{player}: norm of each kernel", xlabel="kimg", yscale="log")
        shares.set(title=f"{player}: penalty's share of the gradient", xlabel="kimg")
        if not any(np.isfinite(line.get_ydata()).any() for line in shares.lines):
            shares.text(0.5, 0.5, "no weight penalty", ha="center", va="center", transform=shares.transAxes)
            shares.set(xticks=[], yticks=[], xlabel="")
        spectrum.xaxis.get_major_locator().set_params(integer=True)
        spectrum.set(title=f"{player}: singular values of\n{which}", xlabel="number", yscale="log")
        label_log(norms)
        label_log(spectrum)
    legend_below(figure, lines[: len(rows)], rows, _LETTERS)
    return figure


def _metrics(row: Row) -> list[dict[str, Any]]:
    return [line for line in rows(row.outcomes[0].trial.folder / "metrics.jsonl") if line["cur_nimg"]]


def _largest_spectrum(row: Row, player: str) -> tuple[str, list[float]]:
    """Name and singular values of a player's largest kernel at the end of training; ("", []) if unknown."""
    for line in rows(row.outcomes[0].trial.folder / "spectrum.jsonl")[-1:]:
        for name, values in line.items():  # the largest first
            if name.startswith(f"{player}/"):
                return name.removeprefix(f"{player}/"), values
    return "", []
