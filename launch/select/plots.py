"""The pictures of a selection: curve.png (see curve.py), and weights.png: the weights of the candidates."""

from __future__ import annotations

import math
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from launch.select import files
from launch.select.choice import Row, ScoreTable
from launch.select.curve import curve, new_figure, numbers, wrapped
from pipeline.run.rows import rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NAME, _ALL = 60, 190  # letters of a name in one line of the legend, and of all names beside each other


def draw(folder: Path, table: ScoreTable) -> list[Path]:
    """curve.png and weights.png; returns what was written. Raises UserError if it cannot be."""
    pictures = {folder / "curve.png": curve(table), folder / "weights.png": weights(table)}
    for path, figure in pictures.items():
        figure.savefig(png := BytesIO(), format="png")
        files.write(path, png.getvalue())
    return list(pictures)


def weights(table: ScoreTable) -> Figure:
    """Per player: norms of kernels over training, the penalty's share of the gradient, and one spectrum."""
    rows = [row for row in table.rows if row.outcomes]
    names = [wrapped(row.arm.label, _NAME) for row in rows]
    longest = max(len(line) for name in names for line in name.splitlines())
    beside = max(1, min(len(rows), _ALL // (longest + 8)))
    figure = new_figure(12, 6.8 + 0.18 * sum(name.count("\n") + 1 for name in names) / beside)
    for player, panels in zip("GD", figure.subplots(2, 3), strict=True):
        norms, shares, spectrum = panels
        kernels = set()
        for row, name, style in zip(rows, names, _styles(rows), strict=True):
            lines = _metrics(row)
            kimg = [line["cur_nimg"] / 1000 for line in lines]
            for chart in [chart for chart in lines[-1] if chart.startswith(f"Weights/{player}/norm/")]:
                norms.plot(kimg, [line.get(chart, math.nan) for line in lines], lw=1, label=name, **style)
            share = [line.get(f"Gradients/{player}/penalty_share", math.nan) for line in lines]
            shares.plot(kimg, share, label=name, **style)
            kernel, values = _largest_spectrum(row, player)
            kernels |= {kernel} - {""}
            spectrum.plot(range(1, len(values) + 1), values, **style)
        which = wrapped(kernels.pop(), 40) if len(kernels) == 1 else "each one's largest kernel"
        norms.set(title=f"{player}: norm of each kernel", xlabel="kimg", yscale="log")
        shares.set(title=f"{player}: penalty's share of the gradient", xlabel="kimg")
        spectrum.set(title=f"{player}: singular values of\n{which}", xlabel="number", yscale="log")
    handles = shares.get_legend_handles_labels()
    legend = figure.legend(*handles, loc="outside lower center", ncols=beside, fontsize=8)
    legend.set_title(rows[0].arm.title.replace("candidate", ""))
    legend.set_frame_on(False)
    return figure


def _styles(rows: list[Row]) -> list[dict[str, Any]]:
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


def _metrics(row: Row) -> list[dict[str, Any]]:
    return [line for line in rows(row.outcomes[0].trial.folder / "metrics.jsonl") if line["cur_nimg"]]


def _largest_spectrum(row: Row, player: str) -> tuple[str, list[float]]:
    """Name and singular values of a player's largest kernel at the end of training; ("", []) if unknown."""
    for line in rows(row.outcomes[0].trial.folder / "spectrum.jsonl")[-1:]:
        for name, values in line.items():  # the largest first
            if name.startswith(f"{player}/"):
                return name.removeprefix(f"{player}/"), values
    return "", []
