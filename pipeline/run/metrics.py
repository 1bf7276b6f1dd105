"""The names of scores, and how they compare. The functions are in scores.py, as they need torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """What `score.metrics` may name."""

    help: str
    names: tuple[str, ...]  # of its values, which charts show as Metrics/<name>_<features>
    lower_is_better: bool | None  # None: neither is
    leads: bool = False  # checkpoints and candidates are compared by its chart
    canonical: str | None = None  # the name of its chart with the features that define it
    needs_train: bool = False  # compares (train, held-out, fake)

    def charts(self, features: str, canonical: bool) -> list[str]:
        """Names of its values, given the features' name and whether they are the defining ones."""
        named = self.canonical if canonical else None
        return [named or f"{name}_{features}" for name in self.names]


METRICS = {
    "kid": Metric("kernel distance (KID)", ("kid",), True, leads=True),
    "fd": Metric("Fréchet distance (FID, if of inception's features)", ("fd",), True, True, "fid"),
    "pr": Metric("precision and recall", ("precision", "recall"), False),
    "dc": Metric("density and coverage", ("density", "coverage"), False),
    "nn": Metric(
        "memorisation: distances to the nearest training image",
        ("nn_ratio", "nn_copies"),
        lower_is_better=None,
        needs_train=True,
    ),
}


def metric_of(chart: str) -> Metric | None:
    """The metric whose value a chart shows; None for counts of images, and for what this version does not
    know."""
    name = chart.removeprefix("Metrics/")
    if name.endswith("_images"):
        return None
    for metric in METRICS.values():
        canonical = metric.canonical is not None and name.startswith(metric.canonical)
        if canonical or name.startswith(tuple(f"{each}_" for each in metric.names)):
            return metric
    return None


def leading_chart(metrics: Sequence[str], charts: Iterable[str]) -> str | None:
    """The chart by which checkpoints and candidates are compared: of the first of `metrics` that leads, on
    held-out images. None if there is none."""
    charts = [chart for chart in charts if not chart.endswith("_train")]
    for metric in (METRICS[name] for name in metrics if METRICS[name].leads):
        for chart in charts:
            if chart.startswith(f"Metrics/{metric.names[0]}_") or chart == f"Metrics/{metric.canonical}":
                return chart
    return None
