"""How candidates look in pictures of their lines: colours, and a legend with room for long names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from launch.select.choice import Row
from launch.select.curve import numbers
from pipeline.run.curves import columns_of, wrapped

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NAME = 60  # letters of a name in one line of the legend


def styles(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """How the lines of each candidate look: graded for the values of one number, else clearly distinct."""
    from matplotlib import colormaps

    if values := numbers(rows):
        order = np.argsort(np.argsort(values, kind="stable"))
        return [{"color": colour} for colour in colormaps["viridis"](0.9 * order / max(1, len(rows) - 1))]
    colour_map, many = ("tab10", 10) if len(rows) <= 10 else ("tab20", 20)
    dashes = ["-", "--", ":", "-."]
    return [
        {"color": colormaps[colour_map](i % many), "ls": dashes[i // many % len(dashes)]}
        for i in range(len(rows))
    ]


def names(rows: Sequence[Row]) -> list[str]:
    return [wrapped(row.arm.label, _NAME) for row in rows]


def columns(rows: Sequence[Row], letters: int) -> int:
    """Names beside each other in a legend with room for so many letters."""
    return columns_of(names(rows), letters)


def height(rows: Sequence[Row], letters: int) -> float:
    """Of the legend, in inches."""
    return 0.3 + 0.18 * sum(name.count("\n") + 1 for name in names(rows)) / columns(rows, letters)


def legend_below(figure: Figure, handles: Sequence[Any], rows: Sequence[Row], letters: int) -> None:
    """Under all panels; handles: one per candidate."""
    legend = figure.legend(
        handles, names(rows), loc="outside lower center", ncols=columns(rows, letters), fontsize=8
    )
    legend.set_title(rows[0].arm.title.replace("candidate", ""))
    legend.set_frame_on(False)
