"""learning.png: the score of each candidate over training, and which would be chosen at each budget."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from launch.select.choice import ScoreTable
from launch.select.curve import MARK, MOST, new_figure, numbers, readable
from launch.select.legend import height, legend_below, styles
from pipeline.run.curves import wrapped
from pipeline.run.panels import band_floor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

_LETTERS = 140  # of names beside each other
_RING = 14  # letters of a name that fits beside its ring


def learning(table: ScoreTable) -> Figure:
    """Means over folds and seeds, with bands of one standard error.

    Only trials count that all candidates have, at each budget by itself.
    """
    rows = table.shown(MOST, [row.arm for _, row in table.by_budget])
    if values := numbers(rows):
        rows = [rows[i] for i in np.argsort(values, kind="stable")]
    all_lines = table.lines
    lines = [all_lines[row.arm] for row in rows]
    figure = new_figure(9, 4.6 + height(rows, _LETTERS))
    axes = figure.subplots()
    every = [at.mean for line in lines for at in line.values()]
    floor = band_floor(every)
    drawn: list[Any] = []
    for line, style in zip(lines, styles(rows), strict=True):
        kimgs, means = [*line], [at.mean for at in line.values()]
        drawn += axes.plot(kimgs, means, marker="o", ms=3.5, lw=1.6, **style)
        errors = [0.0 if math.isnan(at.error) else at.error for at in line.values()]
        low = [max(mean - error, floor) for mean, error in zip(means, errors, strict=True)]
        high = [mean + error for mean, error in zip(means, errors, strict=True)]
        axes.fill_between(kimgs, low, high, color=style["color"], alpha=0.25, lw=0)
    ring = _rings(axes, table)
    readable(axes, every)
    axes.set(xlabel="kimg: thousands of real images shown to D", ylabel=f"{table.score} on held-out images")
    axes.grid(color="#dddddd", lw=0.6)
    axes.set_axisbelow(True)
    axes.legend(handles=ring, loc="upper right", fontsize=8, frameon=False)
    legend_below(figure, drawn, rows, _LETTERS)
    return figure


def _rings(axes: Axes, table: ScoreTable) -> list[Line2D]:
    """Around what would be chosen at each budget, with its name where it changes."""
    chosen = table.by_budget
    before = None
    for number, (kimg, row) in enumerate(chosen):
        if row.arm != before:
            side = "left" if number == 0 else "right" if number == len(chosen) - 1 else "center"
            # The colour says it too.
            name = wrapped(row.arm.label, _RING) if len(row.arm.label) <= _RING else ""
            look: dict[str, Any] = {"ha": side, "va": "top", "fontsize": 8, "color": MARK}
            axes.annotate(name, (kimg, row.mean), (0, -9), textcoords="offset points", **look)
        before = row.arm
    axes.margins(y=0.14)
    ring: dict[str, Any] = {"ms": 12, "mfc": "none", "mec": MARK, "mew": 1.6, "label": "chosen there"}
    return axes.plot([kimg for kimg, _ in chosen], [row.mean for _, row in chosen], "o", zorder=5, **ring)
