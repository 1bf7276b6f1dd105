"""What a page says of a selection (`shardgan select`), read from its table.json and trials."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.config import UserError
from pipeline.credentials import anonymous
from pipeline.run.comparison import differing
from pipeline.run.history import read_history
from pipeline.run.page.charts import Chart, Line, colours, of_several
from pipeline.run.page.facts import Facts, Setting
from pipeline.run.page.pictures import Picture, plotted, strip
from pipeline.run.panels import band_floor, far_apart, label_of
from pipeline.wording import counted, in_kimg

TABLE = "table.json"
_WIDE = 12  # letters of a candidate's name that fit under a point


class Selection:
    """The candidates of a selection and their finished trials."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError if its table cannot be read, or no trial is finished."""
        self.folder = folder
        try:
            self._table: dict[str, Any] = json.loads((folder / TABLE).read_bytes())
            self.rows = [_Candidate(folder, row) for row in self._table["rows"]]
            self.score = label_of(f"Metrics/{self._table['score']}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder / TABLE} cannot be read: {error}") from None
        if not any(row.trials for row in self.rows):
            raise UserError(f"{folder} has no finished trial yet: there is nothing to show.")

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def chosen(self) -> str | None:
        formerly = self._table.get("one_standard_error")
        name: str | None = self._table.get("chosen", formerly)
        return name

    @property
    def what(self) -> str:
        config = self.example.config
        each = max(len(row.scores) for row in self.rows)
        held = f"{config.data.folds} folds" if config.data.folds else "cross-validation"
        return (
            f"{counted(len(self.rows), 'candidate')} for {self.key}, compared by {held}: "
            f"{counted(each, 'training')} of each, of {in_kimg(config.run.total_kimg)} kimg, scored on "
            "images that were held out."
        )

    @property
    def key(self) -> str:
        """The settings that candidates differ in."""
        keys = dict.fromkeys(text.partition("=")[0] for row in self.rows for text in row.settings)
        return ", ".join(keys) or "settings"

    @property
    def conclusion(self) -> str:
        """Sentences that claim no more than the trials show."""
        formerly = [f"Chosen: {self.chosen}." if self.chosen else "Nothing is chosen yet."]
        return anonymous(" ".join(self._table.get("conclusion", formerly)))

    @cached_property
    def example(self) -> Facts:
        """The first finished trial."""
        return next(facts for row in self.rows for facts in row.trials)

    @property
    def settings(self) -> list[Setting]:
        """Those that all finished trials share."""
        apart = differing([facts.values for row in self.rows for facts in row.trials])
        return [setting for setting in self.example.settings if setting.key not in apart]

    @property
    def strips(self) -> list[tuple[_Candidate, Picture]]:
        found = [(row, strip(row.trials[0].folder, row.trials[0].config)) for row in self.rows if row.trials]
        return [(row, picture) for row, picture in found if picture]

    @property
    def reals(self) -> Picture | None:
        return strip(self.example.folder, self.example.config, real=True)

    @property
    def drawn(self) -> Picture | None:
        """curve.png, for readers without JavaScript."""
        return plotted(self.folder / "curve.png")

    @property
    def pictures(self) -> list[tuple[str, Picture]]:
        """Drawings that only some selections have, and what they show."""
        shown = {
            "search.png": "What was proposed, over each range and in order",
            "grid.png": "The grid as a map",
        }
        found = [(text, plotted(self.folder / name)) for name, text in shown.items()]
        return [(text, picture) for text, picture in found if picture]

    @property
    def by_budget(self) -> list[tuple[float, str, float, float | None]]:
        """(kimg, what would be chosen there, its mean, its error), if scores along the way say."""
        labels = {row.name: row for row in self.rows}
        found = []
        for entry in self._table.get("by_budget") or ():
            row = labels.get(entry["chosen"])
            point = row.point(entry["kimg"]) if row else None
            if row and point:
                found.append((float(entry["kimg"]), row.label, *point))
        return found if len(found) > 1 else []

    @property
    def budgets(self) -> list[Chart]:
        """Score over training: a mean with a band for each candidate; none without scores along the way."""
        if not self.by_budget:
            return []
        lines = [
            (row, shade, [(kimg, *point) for kimg in row.by_kimg if (point := row.point(kimg))])
            for row, shade in self._shaded
        ]
        means = [mean for _, _, points in lines for _, mean, _ in points]
        floor = band_floor(means)
        traces: list[dict[str, Any]] = []
        for row, shade, points in lines:
            mean = [value for _, value, _ in points]
            error = [error or 0.0 for _, _, error in points]
            traces.append(
                {
                    "name": row.label,
                    "colour": shade,
                    "x": [kimg for kimg, _, _ in points],
                    "y": mean,
                    "low": [max(m - e, floor) for m, e in zip(mean, error, strict=True)],
                    "high": [m + e for m, e in zip(mean, error, strict=True)],
                }
            )
        title = f"{self.score} on held-out images: mean over trainings, with its standard error"
        return [{"title": title, "traces": traces, "x": "kimg", "wide": True} | _scale(means)]

    @property
    def _shaded(self) -> list[tuple[_Candidate, str]]:
        """The candidates with finished trials, each in its colour."""
        rows = [row for row in self.rows if row.trials]
        graded = all(row.number is not None for row in rows)
        by_size = sorted(rows, key=lambda row: row.number or 0) if graded else rows
        shades = dict(zip((row.name for row in by_size), colours(len(rows), graded), strict=True))
        return [(row, shades[row.name]) for row in rows]

    @property
    def problems(self) -> list[tuple[str, str]]:
        found = [(trial, text) for row in self.rows for trial, text in row.failed.items()]
        for row in self.rows:
            for facts in row.trials:
                found += [(facts.name, f"{when}: {text}") for when, text in facts.troubles]
        return [(anonymous(trial), anonymous(text)) for trial, text in found]

    @property
    def curve(self) -> Chart:
        """Mean, standard error and trials of each: from left to right, if their labels are short."""
        rows = [row for row in self.rows if row.mean is not None]
        if all(row.number is not None for row in rows):  # a search proposes them in any order
            rows.sort(key=lambda row: row.number or 0)
        upright = all(len(row.label) <= _WIDE for row in rows)
        points = [
            {"label": row.label, "mean": row.mean, "error": row.error, "scores": row.scores} for row in rows
        ]
        chosen = [row.label for row in rows if row.name == self.chosen]
        means, scores = [row.mean or 0.0 for row in rows], [s for row in rows for s in row.scores]
        return _scale(means, min(scores, default=0.0)) | {
            "title": f"{self.score} on held-out images: lower is better",
            "candidates": points,
            "chosen": chosen,
            "upright": upright,
            "x": self.key if upright else "",
        }

    @property
    def learning(self) -> list[Chart]:
        """Curves of all trials, coloured by candidate."""
        return of_several(
            [
                Line(facts, row.label, shade, first=not place)
                for row, shade in self._shaded
                for place, facts in enumerate(row.trials)
            ]
        )


class _Candidate:
    """A row of table.json."""

    def __init__(self, folder: Path, row: Mapping[str, Any]) -> None:
        self.name, self.settings = str(row["arm"]), [str(text) for text in row["settings"]]
        self.mean, self.error = _finite(row.get("mean")), _finite(row.get("standard_error"))
        by_trial = row.get("by_trial") or {}
        self.scores = [score for value in by_trial.values() if (score := _finite(value)) is not None]
        self.failed: dict[str, str] = dict(row.get("failed") or {})
        self.pending = len(row.get("not_done") or ())
        difference = row.get("minus_minimum") or (None, None)
        self.difference = tuple(map(_finite, difference))
        self.by_kimg = {float(at["kimg"]): at for at in row.get("by_kimg") or ()}
        self.trials = list(_facts(folder / "trials" / name for name in by_trial))

    def point(self, kimg: float) -> tuple[float, float | None] | None:
        """Mean and standard error at a budget; None without a score."""
        at = self.by_kimg.get(kimg, {})
        mean = _finite(at.get("mean"))
        return None if mean is None else (mean, _finite(at.get("standard_error")))

    @property
    def label(self) -> str:
        """The value alone, if one setting is tried."""
        one = len(self.settings) == 1 and self.name == self.settings[0]
        return anonymous(self.settings[0].partition("=")[2] if one else self.name)

    @property
    def number(self) -> float | None:
        try:
            return float(self.label)
        except ValueError:
            return None


def _scale(means: Sequence[float], lowest: float = math.inf) -> dict[str, Any]:
    """Of the axis of scores. lowest: of all that is drawn."""
    log = far_apart(means) and lowest > 0
    return {"log": log, "decades": math.log10(max(means) / min(means)) if log else 0.0}


def _facts(folders: Iterable[Path]) -> Iterator[Facts]:
    for folder in folders:
        with suppress(UserError):  # it was removed since
            yield Facts(read_history(folder))


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
