"""What one watches of a run: which charts are drawn together, in pictures and on pages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pipeline.run.history import History
from pipeline.run.metrics import metric_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SETTINGS = "Progress/"  # charts of what applies: news only if it changes
# Of an axis whose upper end is less than so many times its lower end: the digits that are labelled.
_LABELLED = ((4, (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)), (30, (1, 2, 3, 5, 7)), (300, (1, 2, 5)))
_SCORES = (("real", "Loss/scores/real"), ("fake", "Loss/scores/fake"), ("held-out", "Loss/scores/heldout"))


@dataclass(frozen=True)
class Panel:
    """title, and (legend, chart) of each line; a line without points is left out, as is an empty panel."""

    title: str
    lines: tuple[tuple[str, str], ...]
    marked: bool = False  # whether the lowest value of the first line is marked
    log: bool = True  # whether the axis may be logarithmic


def far_apart(scores: Sequence[float]) -> bool:
    """Whether candidates' scores differ so much that they are shown in log, or a hopeless one would hide how
    the others differ."""
    return min(scores, default=0) > 0 and max(scores) > 2 * min(scores)


def band_floor(means: Sequence[float]) -> float:
    """Below which no band of errors is drawn around any of the means: in log, one that comes near 0 would
    leave no room for anything else."""
    return min(means) / 2 if far_apart(means) else -math.inf


def label_log(axes: Axes, upright: bool = True) -> None:
    """Label a logarithmic axis, once everything is drawn, with as many plain numbers as there is room for."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis, (low, high) = (axes.yaxis, axes.get_ylim()) if upright else (axes.xaxis, axes.get_xlim())
    digits = next((digits for most, digits in _LABELLED if high < most * low), (1,))
    axis.set_major_locator(LogLocator(subs=digits))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def panels_of(histories: Sequence[History]) -> list[Panel]:
    """What someone who trains a GAN watches: scores first, then whether D and G keep each other in balance,
    then what regularisation does."""
    charts = dict.fromkeys(chart for history in histories for chart in history.charts)
    penalties = [c for c in charts if c.startswith("Loss/") and c.endswith("_penalty")]
    penalties.sort(key=lambda chart: (chart.split("/")[2], chart.startswith("Loss/D/")))
    found = [
        *_of_scores(histories, list(charts)),
        _of_both("Loss, without penalties", "Loss/{}/adversarial"),
        Panel("D's scores of images", _SCORES),
        Panel("Penalties in the loss", tuple((_penalty(chart), chart) for chart in penalties)),
        _of_both("Norm of the gradient", "Gradients/{}/norm"),
        _of_both("Penalty's share of the gradient", "Gradients/{}/penalty_share"),
        _of_both("Norm of the weights", "Weights/{}/norm"),
        _of_both("Learning rate", "Progress/{}/lr"),
        _of_both("λ", "Progress/{}/l2"),
        Panel("p of augmentation", (("p", "Progress/augment_p"),), log=False),
        Panel("Images per second", (("images", "Timing/img_per_sec"),), log=False),
    ]
    drawn = {chart for chart in charts if any(is_news(history, chart) for history in histories)}
    found = [replace(panel, lines=tuple(line for line in panel.lines if line[1] in drawn)) for panel in found]
    return [panel for panel in found if panel.lines]


def is_news(history: History, chart: str) -> bool:
    """Whether a run has a line to see there: what is off is 0 throughout."""
    values = set(history.series(chart)[1])
    return len(values) > 1 if chart.startswith(_SETTINGS) else any(values)


def label_of(chart: str) -> str:
    """A name for people: KID of Metrics/kid_efflite0; what compares with training images says so."""
    name = chart.removeprefix("Metrics/")
    stem, _, rest = name.partition("_")
    known = {
        "kid": "KID",
        "fd": "Fréchet distance",
        "fid": "FID",
        "fid50k": "FID of 50,000",
        "nn": "Copies of training images"
        if rest.startswith("copies")
        else "Relative distance to training images",
    }
    train = ", to training images" if name.endswith("_train") else ""
    return f"{known.get(stem, stem.capitalize())}{train}"


def _of_scores(histories: Sequence[History], charts: Sequence[str]) -> list[Panel]:
    """Distances, the leading ones first, each by itself; then shares and the like together."""
    leading = list(dict.fromkeys(chart for history in histories for chart in history.leading_scores))
    lead = {_stem(chart) for chart in leading}
    other = [c for c in charts if c.startswith("Metrics/") and not c.endswith(("_images", "_train"))]
    other = [c for c in other if c not in leading and _stem(c) not in lead]
    distances = [c for c in other if (metric := metric_of(c)) and metric.leads]
    alone = [Panel(label_of(c), ((label_of(c), c),), marked=True) for c in [*leading, *distances]]
    others = tuple((label_of(c), c) for c in other if c not in distances)
    return [*alone, Panel("Other scores", others, log=False)]


def _of_both(title: str, chart: str) -> Panel:
    return Panel(title, tuple((player, chart.format(player)) for player in "GD"))


def _stem(chart: str) -> str:
    return chart.removeprefix("Metrics/").partition("_")[0]


def _penalty(chart: str) -> str:
    _, player, name = chart.split("/")
    return f"{player} {name.removesuffix('_penalty')}"
