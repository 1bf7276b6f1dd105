"""The curves of a page, as plotly's traces.

A chart is {"title", "log", "decades", "traces", "x"}, a trace {"name", "x", "y", "colour", …}; page.js draws
them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.run.page.facts import Facts
from pipeline.run.page.pictures import thinned
from pipeline.run.panels import Panel, is_news, panels_of

Chart = dict[str, Any]

_LINEAR = 1.5  # decades that a linear axis shows
_POINTS = 800  # of a curve: more do not show
# Neither too dark for a black page nor too pale for a white one.
_PALETTE = ("#3b76c4", "#d9822b", "#2f9e6e", "#c2437a", "#7a5cc9", "#8a8f98", "#b59a1f", "#2aa5b8")
# From the smallest to the largest: viridis without its ends, which vanish on black or white.
_RAMP = ("#414487", "#2f6b8e", "#25858e", "#1e9c89", "#35b779", "#6ece58", "#b5c92a")


@dataclass(frozen=True)
class Line:
    """A run among others: its name in legends, its colour, and whether it is the first of that name."""

    facts: Facts
    name: str
    colour: str
    first: bool = True


def colours(count: int, graded: bool = False) -> list[str]:
    """One per run; graded: from small to large."""
    if graded and count > 1:
        return [_RAMP[round(i * (len(_RAMP) - 1) / (count - 1))] for i in range(count)]
    return [_PALETTE[i % len(_PALETTE)] for i in range(count)]


def of_one(facts: Facts) -> list[Chart]:
    """The charts of a run by itself: related curves together."""
    found = []
    for panel in panels_of([facts.history]):
        traces = [
            {"name": name, "colour": colour, **_points(facts, chart)}
            for (name, chart), colour in zip(panel.lines, colours(len(panel.lines)), strict=True)
        ]
        found.append(_chart(panel.title, panel, traces))
    return found


def of_several(lines: Sequence[Line]) -> list[Chart]:
    """The same quantity of several runs in each chart."""
    found = []
    for panel in panels_of([line.facts.history for line in lines]):
        for name, chart in panel.lines:
            traces: list[dict[str, Any]] = [
                {"name": line.name, "colour": line.colour, "first": line.first, **_points(line.facts, chart)}
                for line in lines
                if is_news(line.facts.history, chart)
            ]
            if any(len(trace["x"]) > 1 for trace in traces):
                title = name if chart.startswith("Metrics/") else f"{panel.title}: {name}"
                found.append(_chart(panel.title if len(panel.lines) == 1 else title, panel, traces))
    return found


def _points(facts: Facts, chart: str) -> dict[str, list[float | None]]:
    rows = thinned([row for row in facts.rows if isinstance(row.get(chart), int | float)], _POINTS)
    return {"x": [row["cur_nimg"] / 1000 for row in rows], "y": [_short(row[chart]) for row in rows]}


def _short(value: float) -> float | None:
    """With five digits; JSON knows no infinity and no nan."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _chart(title: str, panel: Panel, traces: list[dict[str, Any]]) -> Chart:
    values = [y for trace in traces for y in trace["y"] if y is not None]
    decades = math.log10(max(values) / min(values)) if values and min(values) > 0 else 0
    log = panel.log and decades > _LINEAR
    return {"title": title, "log": log, "decades": decades, "traces": traces, "x": "kimg"}
