"""search.png: the scores of what a search has proposed, over each of its ranges, and the best so far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from launch.select.candidates import Arm, in_time
from launch.select.choice import Row, ScoreTable
from launch.select.curve import DARK, GREY, MARK, new_figure, readable
from pipeline.run.curves import wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BESIDE = 3  # panels
_NAME = 12  # letters in a line of a value that is no number


def searched(table: ScoreTable) -> Figure:
    """A panel for each key, and one for the order of proposals; candidates of which a trial failed are on
    top."""
    keys = list(table.rows[0].arm.values)
    rows = table.comparable
    failed = [row for row in table.rows if row.failures]
    beside = min(_BESIDE, len(keys) + 1)
    lines = math.ceil((len(keys) + 1) / beside)
    figure = new_figure(0.6 + 4.2 * beside, 0.7 + 3.4 * lines)
    panels: list[Axes] = [*figure.subplots(lines, beside, squeeze=False, sharey=True).flat]
    for key, axes in zip(keys, panels, strict=False):
        places = _places(axes, key, [*rows, *failed], table.rows[0].arm)
        _points(axes, table, rows, places[: len(rows)])
        _failures(axes, places[len(rows) :])
        axes.set_xlabel(key)
    order = panels[len(keys)]
    numbers = {row.arm: number for number, row in enumerate(table.rows, 1)}
    at = [numbers[row.arm] for row in rows]
    best = np.minimum.accumulate([row.mean for row in rows])
    order.step(at, best, where="post", color=DARK, lw=1.2, label="best so far", zorder=1)
    _points(order, table, rows, at)
    _failures(order, [numbers[row.arm] for row in failed])
    order.set_xlabel("candidate, in the order of proposals")
    order.locator_params(axis="x", integer=True)
    readable(panels[0], [row.mean for row in rows])
    for axes in panels[::beside]:
        axes.set_ylabel(f"{table.score} on held-out images")
    for axes in panels[len(keys) + 1 :]:
        axes.axis("off")
    found = [axes.get_legend_handles_labels() for axes in panels]
    once = {label: handle for handles, labels in found for handle, label in zip(handles, labels, strict=True)}
    figure.legend([*once.values()], [*once], loc="outside upper left", ncols=6, fontsize=8, frameon=False)
    return figure


def _points(axes: Axes, table: ScoreTable, rows: Sequence[Row], places: Sequence[float]) -> None:
    """Mean and standard error of each; the first, mostly λ = 0, as a line to compare with."""
    first, chosen = table.rows[0], table.choice
    for place, row in zip(places, rows, strict=True):
        mine = row.arm == first.arm
        if mine and len(rows) > 1:
            axes.axhline(row.mean, color=GREY, lw=0.9, ls="--", zorder=0, label=_named(first))
        error = row.error if math.isfinite(row.error) else 0.0
        look: dict[str, Any] = {"fmt": "s", "color": GREY} if mine else {"fmt": "o", "color": DARK}
        label = "" if mine else "mean ± standard error"
        axes.errorbar(place, row.mean, yerr=error, label=label, ms=5, lw=1, **look)
        if chosen and row.arm == chosen.arm:
            axes.plot([place], [row.mean], "o", ms=13, mfc="none", mec=MARK, mew=1.5, label="best", zorder=4)


def _named(row: Row) -> str:
    """The first candidate, in a legend."""
    label = f"{row.arm.title}={row.arm.label}" if len(row.arm.values) == 1 else f"the first: {row.arm.label}"
    return wrapped(label, 60)


def _failures(axes: Axes, places: Sequence[float]) -> None:
    if places:
        look: dict[str, Any] = {"color": MARK, "ms": 6, "clip_on": False, "label": "a trial failed"}
        axes.plot(places, [1.0] * len(places), "x", transform=axes.get_xaxis_transform(), **look)


def _places(axes: Axes, key: str, rows: Sequence[Row], first: Arm) -> list[float]:
    """Where the values of a key are drawn: numbers in log if they span a decade or more, with 0 on the left,
    and null or [from, to], which the `first` candidate may have, nowhere; anything else evenly."""
    values = [row.arm.number(key) for row in rows]
    numbered = [row for row, value in zip(rows, values, strict=True) if value is not None]
    if {row.arm for row in rows} - {row.arm for row in numbered} == {first} and numbered:
        places = iter(_places(axes, key, numbered, first))
        return [math.nan if value is None else next(places) for value in values]
    found = [value for value in values if value is not None]
    if len(found) < len(values):
        texts = list(dict.fromkeys(row.arm.values[key] for row in rows))
        axes.set_xticks(range(len(texts)), [wrapped(in_time(key, text, " → "), _NAME) for text in texts])
        axes.set_xlim(-0.5, len(texts) - 0.5)
        return [float(texts.index(row.arm.values[key])) for row in rows]
    positive = [value for value in found if value > 0]
    if min(found) < 0 or not positive or max(positive) < 10 * min(positive):
        axes.locator_params(axis="x", integer=all(value.is_integer() for value in found))
        return found
    axes.set_xscale("log")
    decades = math.log10(max(positive) / min(positive))
    zero = min(positive) / 10 ** max(0.5, 0.15 * decades)
    if len(positive) < len(found):
        low, high = math.ceil(math.log10(min(positive))), math.floor(math.log10(max(positive)))
        step = max(1, round((high - low) / 4))
        ticks = [10.0**power for power in range(low, high + 1, step)]
        axes.minorticks_off()
        axes.set_xticks([zero, *ticks], ["0", *(f"{tick:g}" for tick in ticks)])
        axes.axvline((zero * min(positive)) ** 0.5, color=GREY, lw=0.6, ls=":", zorder=0)
    return [value if value > 0 else zero for value in found]
