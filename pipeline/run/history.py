"""What a run has recorded in its folder, read for pictures, tables and pages. Nothing here needs torch."""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from pipeline.credentials import all_redacted
from pipeline.errors import UserError
from pipeline.run.changes import CHANGES, data_since
from pipeline.run.evaluations import evaluated
from pipeline.run.folder import begun, flattened, reference_of
from pipeline.run.metrics import METRICS, leading_chart
from pipeline.run.rows import Row, each_row
from pipeline.run.terminal import is_score
from pipeline.run.wandb_mode import public
from pipeline.wording import in_kimg

_TRIAL = re.compile(r"(.*),seed=\d+,fold=\d+")
_NUMBER = re.compile(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)")


def seconds_of(recorded: Iterable[Row]) -> float:
    """Spent in training by the lines of metrics.jsonl, without scoring and saving."""
    before, seconds = 0, 0.0
    for row in recorded:
        if speed := row.get("Timing/img_per_sec"):
            seconds += (row["cur_nimg"] - before) / speed
        before = row["cur_nimg"]
    return seconds


@dataclass(frozen=True)
class Score:
    """A value of a score. cur_nimg: how many images had been shown."""

    cur_nimg: int
    value: float

    def __str__(self) -> str:
        return f"{self.value:.4g} at kimg {in_kimg(self.cur_nimg / 1000)}"


@dataclass(frozen=True)
class History:
    """One run's records. name: unique among those read together."""

    folder: Path
    name: str
    rows: tuple[Row, ...]  # of metrics.jsonl, by cur_nimg, of which no two are equal
    changes: tuple[Row, ...]  # of changes.jsonl: cur_nimg, key, old, new

    @property
    def candidate(self) -> str:
        """Of a trial, what it has in common with those of other seeds and folds; else the name."""
        trial = _TRIAL.fullmatch(self.name)
        return trial[1] if trial else self.name

    @cached_property
    def charts(self) -> list[str]:
        """The names of all charts, sorted."""
        return sorted(self._points)

    def series(self, chart: str) -> tuple[list[float], list[float]]:
        """A chart's points: kimg, and values, of which some may not be finite."""
        places, values = self._points.get(chart, ([], []))
        return [place / 1000 for place in places], values

    @property
    def scores(self) -> list[str]:
        """The charts of scores."""
        return [chart for chart in self.charts if is_score(chart)]

    @property
    def leading_scores(self) -> list[str]:
        """The charts by which checkpoints and runs are compared, at most one per metric; the lower the
        better."""
        found = (leading_chart([name], self.charts) for name in METRICS)
        return [chart for chart in found if chart]

    def last(self, chart: str) -> Score | None:
        """The last point of a chart; None if it has none, of a score: since the run has its present data."""
        places, values = self._points.get(chart, ([], []))
        if not places or (is_score(chart) and places[-1] <= self.data_since):
            return None
        return Score(places[-1], values[-1])

    @cached_property
    def data_since(self) -> int:
        """The cur_nimg after which it has its present data; −1 if it always had. Earlier scores do not
        compare."""
        return data_since(self.changes)

    def finite(self, chart: str) -> list[Score]:
        """The finite points of a score's chart since the run has its present data."""
        points = zip(*self._points.get(chart, ([], [])), strict=True)
        return [Score(at, value) for at, value in points if math.isfinite(value) and at > self.data_since]

    def lowest(self, chart: str) -> Score | None:
        """The lowest of the finite points, and the first of equal ones; None if there are none."""
        return min(self.finite(chart), key=lambda score: score.value, default=None)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Dotted key → value of all settings, without passwords in URLs. Of a config.yaml that this version
        does not read: what it holds; {} if there is none."""
        try:
            values = public(begun(self.folder))
        except (OSError, ValueError):
            values = _raw(self.folder / "config.yaml")
        return {key: value for section, part in values.items() for key, value in _flat(section, part).items()}

    @cached_property
    def reference(self) -> dict[str, dict[str, Any]]:
        """What its scores are against: see `reference_of`."""
        return reference_of(self.folder)

    @cached_property
    def evaluated(self) -> dict[str, tuple[Score, dict[str, Any]]]:
        """For each chart that `shardgan evaluate` has scored: the newest score, and the fingerprints of what
        it is against."""
        found: dict[str, tuple[Score, dict[str, Any]]] = {}
        for entry in evaluated(self.folder):
            against, at = entry.get("against"), entry.get("cur_nimg")
            for chart, value in entry.items():
                if is_score(chart) and _is_number(value) and isinstance(at, int):
                    found.setdefault(chart, (Score(at, value), against if isinstance(against, dict) else {}))
        return found

    @cached_property
    def _points(self) -> dict[str, tuple[list[int], list[float]]]:
        """cur_nimg and values of each chart: in one pass, as a run of days has many rows."""
        found: dict[str, tuple[list[int], list[float]]] = {}
        for row in self.rows:
            for chart, value in row.items():
                if _is_number(value):
                    places, values = found.setdefault(chart, ([], []))
                    places.append(row["cur_nimg"])
                    values.append(value)
        return {chart: points for chart, points in found.items() if chart not in ("cur_nimg", "time")}


def read_history(folder: Path) -> History:
    """The records of the run in `folder`. Raises UserError if there are none."""
    try:
        by_nimg: dict[int, Row] = {}
        for row in each_row(folder / "metrics.jsonl"):
            by_nimg[row["cur_nimg"]] = by_nimg.get(row["cur_nimg"], {}) | row
        changes = tuple(row for row in each_row(folder / CHANGES) if {"key", "old", "new"} <= row.keys())
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror or error}.") from None
    if not by_nimg:
        raise UserError(f"{folder} has no metrics.jsonl with results: it is no run, or has not begun.")
    ordered = tuple(by_nimg[nimg] for nimg in sorted(by_nimg))
    return History(folder, folder.resolve().name, ordered, changes)


def read_histories(folders: Iterable[Path]) -> list[History]:
    """The records of runs, each once; of a selection's folder, those of its trials. Names are made unique.

    Files are passed over: runs/* names pictures beside the runs too; so are, with a note, runs without
    results if others have some. Raises UserError for a folder that is neither, and if there are no runs.
    """
    kept = (folder for folder in folders if not folder.is_file())
    runs = dict.fromkeys(run.resolve() for folder in kept for run in _runs(folder))
    waiting = [run for run in runs if _has_not_begun(run)]
    if len(waiting) == len(runs):
        waiting = []  # nothing would remain: the first is refused
    found = [read_history(run) for run in runs if run not in waiting]
    if not found:
        raise UserError("There are no runs to read.")
    for run in waiting:
        sys.stderr.write(f"note: {run} is left out: it has no results yet.\n")
    return _named_apart(found)


def _has_not_begun(folder: Path) -> bool:
    """Of a run that has no results, and perhaps no settings: runs/* names it beside the others."""
    try:
        is_run = (folder / "config.yaml").is_file() or all(p.name[0] == "." for p in folder.iterdir())
        return is_run and not any(True for _ in each_row(folder / "metrics.jsonl"))
    except OSError:
        return False  # read_history says why


def trials_of(selection: Path) -> list[Path]:
    """The trials of a selection that have begun, by candidate; none if the folder holds no selection."""
    begun_ones = (file.parent for file in (selection / "trials").glob("*/metrics.jsonl"))
    return sorted(begun_ones, key=lambda trial: _natural(trial.name))


def _runs(folder: Path) -> Sequence[Path]:
    if (folder / "metrics.jsonl").exists() or not (folder / "trials").is_dir():
        return [folder]
    if not (found := trials_of(folder)):
        raise UserError(f"{folder} is a selection of which no trial has begun.")
    return found


def _named_apart(found: Sequence[History]) -> list[History]:
    """Runs of one name get as much of their path as tells them apart."""
    named, depth = list(found), 1
    while depth < 9 and max(Counter(run.name for run in named).values()) > 1:
        depth += 1
        same = Counter(run.name for run in named)
        named = [
            replace(run, name="/".join(run.folder.parts[-depth:])) if same[run.name] > 1 else run
            for run in named
        ]
    return named


def _natural(name: str) -> list[tuple[float, str]]:
    """Sorts numbers within names by their value."""
    parts = _NUMBER.split(name)
    return [(float(part), "") if place % 2 else (0.0, part) for place, part in enumerate(parts)]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _flat(section: str, part: Any) -> dict[str, Any]:
    return flattened(section, part) if isinstance(part, dict) else {section: part}


def _raw(config: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(config.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return all_redacted(values) if isinstance(values, dict) else {}
