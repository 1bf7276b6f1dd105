"""grid.png: the scores of a grid over two keys as a heat map."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from launch.select.candidates import in_time
from launch.select.choice import Row, ScoreTable
from launch.select.curve import MARK, new_figure
from launch.select.verdict import with_error
from pipeline.run.curves import wrapped
from pipeline.run.panels import far_apart, label_log

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BESIDE, _UNDER = 30, 14  # letters in a line of a value's name, on the left and below
_CELL = (1.25, 0.62)  # inches


def heat(table: ScoreTable) -> Figure:
    """A cell for each pair of values: mean and standard error of the trials that all have."""
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.patches import Rectangle

    assert table.plane is not None
    down, across = table.plane
    keys = list(table.rows[0].arm.values)
    compared = {row.arm: row for row in table.comparable}
    cells = {tuple(row.arm.values[key] for key in keys): row for row in table.rows}
    rows = [[cells.get((one, other)) for other in across] for one in down]
    means = np.array([[_mean(compared.get(row.arm) if row else None) for row in line] for line in rows])
    left = [wrapped(in_time(keys[0], value, " → "), _BESIDE) for value in down]
    below = [wrapped(in_time(keys[1], value, " → "), _UNDER) for value in across]
    figure = new_figure(3.4 + _CELL[0] * len(across), 1.5 + _CELL[1] * len(down))
    axes = figure.subplots()
    known = means[np.isfinite(means)]
    scale = LogNorm if far_apart(known.tolist()) else Normalize
    norm = scale(known.min(), known.max()) if known.size else Normalize(0, 1)
    image = axes.imshow(means, cmap="viridis_r", norm=norm, aspect="auto")
    axes.set_xticks(range(len(across)), below, fontsize=8)
    axes.set_yticks(range(len(down)), left, fontsize=8)
    axes.set(xlabel=keys[1], ylabel=keys[0])
    axes.tick_params(length=0)
    for y, line in enumerate(rows):
        for x, row in enumerate(line):
            dark = math.isfinite(means[y, x]) and norm(means[y, x]) > 0.5
            text = _text(row, compared.get(row.arm) if row else None)
            axes.text(x, y, text, ha="center", va="center", fontsize=8, color="white" if dark else "#222222")
            if row and table.choice and row.arm == table.choice.arm:
                frame = Rectangle((x - 0.48, y - 0.47), 0.96, 0.94, fill=False, ec=MARK, lw=3, label="chosen")
                axes.add_patch(frame)
    if axes.patches:
        figure.legend(handles=[*axes.patches], loc="outside upper right", fontsize=8, frameon=False)
    bar = figure.colorbar(image, ax=axes, label=f"{table.score} on held-out images")
    if scale is LogNorm:
        label_log(bar.ax)
    return figure


def _mean(row: Row | None) -> float:
    return row.mean if row else math.nan


def _text(row: Row | None, compared: Row | None) -> str:
    """What a cell says."""
    if row is None:
        return ""
    if compared is None:
        return "failed" if row.failures else "not done"
    return with_error(compared.mean, compared.error).replace(" ± ", "\n± ")
