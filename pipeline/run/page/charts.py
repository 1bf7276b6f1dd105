"""The curves of a page: which charts are drawn together, as plotly's traces.

A chart is {"title", "log", "decades", "traces", "x"}, a trace {"name", "x", "y", "colour", …}; page.js draws
them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.run.page.facts import Facts, label_of
from pipeline.run.page.pictures import thinned

Chart = dict[str, Any]

_LINEAR = 1.5  # decades that a linear axis shows
_POINTS = 800  # of a curve: more do not show
_PALETTE = ("#3b76c4", "#d9822b", "#2f9e6e", "#c2437a", "#7a5cc9", "#8a8f98", "#b59a1f", "#2aa5b8")
# From the smallest to the largest: viridis without its ends, which vanish on black or white.
_RAMP = ("#414487", "#2f6b8e", "#25858e", "#1e9c89", "#35b779", "#6ece58", "#b5c92a")


@dataclass(frozen=True)
class Panel:
    """Charts that are drawn together; of several runs, each is a panel of its own."""

    title: str
    charts: tuple[tuple[str, str], ...]  # (chart, its name here)


_PANELS = (
    Panel("Losses", (("Loss/D/loss", "D"), ("Loss/G/loss", "G"))),
    Panel(
        "D's scores (logits, before the sigmoid)",
        (
            ("Loss/scores/real", "real"),
            ("Loss/scores/heldout", "held-out"),
            ("Loss/scores/fake", "generated"),
        ),
    ),
    Panel("L2 penalties λ‖W‖²", (("Loss/D/l2_penalty", "D"), ("Loss/G/l2_penalty", "G"))),
    Panel("L1 penalties", (("Loss/D/l1_penalty", "D"), ("Loss/G/l1_penalty", "G"))),
    Panel(
        "Gradient penalties",
        (
            ("Loss/D/r1_penalty", "R1"),
            ("Loss/D/r2_penalty", "R2"),
            ("Loss/D/wgan_gp_penalty", "WGAN-GP"),
            ("Loss/G/path_penalty", "path length"),
        ),
    ),
    Panel("Norms of the weights", (("Weights/D/norm", "D"), ("Weights/G/norm", "G"))),
    Panel("Norms of the gradients", (("Gradients/D/norm", "D"), ("Gradients/G/norm", "G"))),
    Panel(
        "The weight penalty's share of the gradient",
        (("Gradients/D/penalty_share", "D"), ("Gradients/G/penalty_share", "G")),
    ),
    Panel("Learning rate", (("Progress/D/lr", "D"), ("Progress/G/lr", "G"))),
    Panel("λ", (("Progress/D/l2", "D"), ("Progress/G/l2", "G"))),
    Panel("Probability of augmentation", (("Progress/augment_p", "p"),)),
    Panel("Speed, images per second", (("Timing/img_per_sec", "speed"),)),
)
_CONSTANT_IS_NO_NEWS = ("Progress/",)


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
    panels = [*_score_panels([facts]), *_PANELS]
    found = []
    for panel in panels:
        charts = [(chart, name) for chart, name in panel.charts if _worth_it(facts, chart)]
        shades = dict(zip((name for _, name in panel.charts), colours(len(panel.charts)), strict=True))
        traces = [{"name": name, "colour": shades[name], **_points(facts, chart)} for chart, name in charts]
        if traces:
            found.append(_chart(panel.title, traces))
    return found


def of_several(lines: Sequence[Line]) -> list[Chart]:
    """The same quantity of several runs in each chart."""
    found = []
    for panel in [*_score_panels([line.facts for line in lines]), *_PANELS]:
        for chart, name in panel.charts:
            traces: list[dict[str, Any]] = [
                {"name": line.name, "colour": line.colour, "first": line.first, **_points(line.facts, chart)}
                for line in lines
                if _worth_it(line.facts, chart)
            ]
            if any(len(trace["x"]) > 1 for trace in traces):
                title = name if chart.startswith("Metrics/") else f"{panel.title}: {name}"
                found.append(_chart(panel.title if len(panel.charts) == 1 else title, traces))
    return found


def _score_panels(runs: Sequence[Facts]) -> Iterator[Panel]:
    """The leading score by itself, then those that are shares, then any other."""
    scores = {score.chart: score for facts in runs for score in facts.scores}
    shares = [(c, label_of(c)) for c in scores if c.startswith(("Metrics/precision", "Metrics/recall"))]
    shares += [(c, label_of(c)) for c in scores if c.startswith(("Metrics/density", "Metrics/coverage"))]
    for chart in scores:
        if (chart, label_of(chart)) not in shares:
            yield Panel(label_of(chart), ((chart, label_of(chart)),))
    if shares:
        yield Panel("Precision, recall, density, coverage", tuple(shares))


def _worth_it(facts: Facts, chart: str) -> bool:
    """Whether there is something to see: any value, and of settings any change."""
    values = {row[chart] for row in facts.rows if isinstance(row.get(chart), int | float)}
    if chart.startswith(_CONSTANT_IS_NO_NEWS):
        return len(values) > 1
    return bool(values) and not (values <= {0} and chart.endswith(("penalty", "penalty_share")))


def _points(facts: Facts, chart: str) -> dict[str, list[float | None]]:
    rows = thinned([row for row in facts.rows if isinstance(row.get(chart), int | float)], _POINTS)
    return {"x": [row["cur_nimg"] / 1000 for row in rows], "y": [_short(row[chart]) for row in rows]}


def _short(value: float) -> float | None:
    """With five digits; JSON knows no infinity and no nan."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _chart(title: str, traces: list[dict[str, Any]]) -> Chart:
    values = [y for trace in traces for y in trace["y"] if y is not None]
    decades = math.log10(max(values) / min(values)) if values and min(values) > 0 else 0
    return {"title": title, "log": decades > _LINEAR, "decades": decades, "traces": traces, "x": "kimg"}
