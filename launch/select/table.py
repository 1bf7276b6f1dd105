"""What the trials of a selection came to: a row per arm, and which arm to choose."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from launch.select.candidates import Arm
from launch.select.trials import Trial
from pipeline.config import Config, UserError
from pipeline.run.report import say
from pipeline.run.rows import rows

# What may be chosen by: the lower the better, and against held-out images, which fid50k_full is not.
_LEADING = {"kid": r"Metrics/kid_\w+", "fd": r"Metrics/(fd_\w+|fid)"}


@dataclass(frozen=True)
class Outcome:
    """One finished trial."""

    trial: Trial
    score: float  # the one to choose by
    last: Mapping[str, float]  # the row of metrics.jsonl that it stands in
    seconds: float  # of training

    @property
    def place(self) -> tuple[int, int]:
        return self.trial.place


@dataclass(frozen=True)
class Row:
    """One arm: its finished trials, what became of those that failed, and those that are still to come."""

    arm: Arm
    outcomes: Sequence[Outcome]
    failures: Mapping[str, str]
    pending: Sequence[str] = ()  # only told: they count neither for nor against it

    @property
    def label(self) -> str:
        """The value of a grid over one key, else the arm's name."""
        values = list(self.arm.values.values())
        return values[0] if len(values) == 1 else self.arm.name

    @property
    def mean(self) -> float:
        return fmean(o.score for o in self.outcomes) if self.outcomes else math.nan

    @property
    def error(self) -> float:
        """Standard error of the mean over trials; nan for fewer than two."""
        return _error([o.score for o in self.outcomes])

    @property
    def seconds(self) -> float:
        return sum(o.seconds for o in self.outcomes)

    def chart(self, name: str) -> float:
        """The mean over trials of what a chart ends with; nan if it has none."""
        values = [o.last[name] for o in self.outcomes if name in o.last]
        return fmean(values) if values else math.nan

    def against(self, other: Row) -> tuple[float, float]:
        """Mean difference to another arm over the trials both have finished, and its standard error."""
        theirs = {o.place: o.score for o in other.outcomes}
        differences = [o.score - theirs[o.place] for o in self.outcomes if o.place in theirs]
        return (fmean(differences) if differences else math.nan), _error(differences)


@dataclass(frozen=True)
class Table:
    """All arms, and the choice, by the trials (seed and fold) that all have finished: only they compare."""

    score: str  # as in the charts, without "Metrics/"
    rows: Sequence[Row]

    @property
    def comparable(self) -> list[Row]:
        """The arms, each with those of its trials that all have finished. An arm of which some failed is left
        out, unless it has these all the same."""
        done = {row.arm: {o.place for o in row.outcomes} for row in self.rows}
        sound = [done[row.arm] for row in self.rows if not row.failures] or list(done.values())
        common = set[tuple[int, int]].intersection(*sound) if sound else set()
        return [
            Row(row.arm, [o for o in row.outcomes if o.place in common], row.failures)
            for row in self.rows
            if common and common <= done[row.arm]
        ]

    @property
    def minimum(self) -> Row | None:
        return min(self.comparable, key=lambda row: row.mean, default=None)

    @property
    def choice(self) -> Row | None:
        """By the one-standard-error rule: of the arms that are within one standard error of the best one, the
        most regularised (see `order`)."""
        best = self.minimum
        if best is None:
            return None
        limit = best.mean + (0 if math.isnan(best.error) else best.error)
        within = [row for row in self.comparable if row.mean <= limit]
        return max(within, key=lambda row: self._strength(row.arm))

    @property
    def order(self) -> str:
        """What counts as more regularised, in words."""
        keys = list(self.rows[0].arm.values)
        if not any(map(self._grows, keys)):
            return "the first listed"
        words = [f"the larger {key}" if self._grows(key) else f"the {key} listed first" for key in keys]
        return " and ".join(words) + (", by the sum of their ranks" if len(words) > 1 else "")

    def _grows(self, key: str) -> bool:
        """Whether a larger value of a grid's key regularises more."""
        strengthens = key.startswith("penalty.") and key != "penalty.r1.interval"
        strengthens = strengthens or key.endswith((".dropout", ".decoupled_decay"))
        return strengthens and all(row.arm.number(key) is not None for row in self.rows)

    def _strength(self, arm: Arm) -> float:
        if not arm.values:
            return -[row.arm for row in self.rows].index(arm)
        total = 0
        for key in arm.values:
            listed = list(dict.fromkeys(row.arm.values[key] for row in self.rows))
            order = sorted(listed, key=float) if self._grows(key) else listed[::-1]
            total += order.index(arm.values[key])
        return total


def table(base: Config, trials: Sequence[Trial], failures: Mapping[str, str]) -> Table:
    """From whatever trials are finished.

    Raises UserError if trials that stand side by side were scored against different images.
    """
    leading = _leading(base)
    found = [outcome for trial in trials if trial.done and (outcome := _read(trial, leading))]
    _check_references(found)
    unusable = {o.trial.name: "its score is not a number" for o in found if not math.isfinite(o.score)}
    scored = {o.trial.name for o in found}
    unusable |= {t.name: "it has no score" for t in trials if t.done and t.name not in scored}
    failed = {**failures, **unusable}
    rows = [
        Row(
            arm,
            [o for o in found if o.trial.arm == arm and o.trial.name not in unusable],
            {t.name: failed[t.name] for t in trials if t.arm == arm and t.name in failed},
            [t.name for t in trials if t.arm == arm and not t.done and t.name not in failed],
        )
        for arm in dict.fromkeys(t.arm for t in trials)
    ]
    names = [name for o in found[:1] for name in o.last if _leads(name, leading)]
    return Table(names[0].removeprefix("Metrics/") if names else base.score.metrics[0], rows)


def check_scored(base: Config, trials: Sequence[Trial]) -> None:
    """Raises UserError for finished trials without the score that the config says to choose by."""
    leading = _leading(base)
    lacking = [trial for trial in trials if trial.done and _read(trial, leading) is None]
    if lacking:
        have = [name for name, others in _LEADING.items() if all(_read(trial, others) for trial in lacking)]
        more = f", as are {len(lacking) - 1} more" if len(lacking) > 1 else ""
        cure = f"Set score.metrics=[{', '.join(have)}], which is there" if have else "Remove its folder"
        raise UserError(
            f"{lacking[0].name} is finished without the score to choose by, {base.score.metrics[0]}, which "
            f"is the first of score.metrics{more}. {cure}, or give the selection another run.name."
        )


def as_json(of: Table, base: Config, trials: Sequence[Trial]) -> dict[str, Any]:
    """Everything in the table, and the choice. Not a number is null."""
    first = of.rows[0]
    return {
        "score": of.score,
        "total_kimg": base.run.total_kimg,
        "trials": len(trials),
        "finished": sum(len(row.outcomes) for row in of.rows),
        "minimum": of.minimum.arm.name if of.minimum else None,
        "one_standard_error": of.choice.arm.name if of.choice else None,
        "rows": [
            {
                "arm": row.arm.name,
                "settings": list(row.arm.settings),
                "finished": len(row.outcomes),
                "mean": _number(row.mean),
                "standard_error": _number(row.error),
                f"minus {first.arm.name}": [_number(value) for value in row.against(first)],
                "by_trial": {o.trial.name: o.score for o in row.outcomes},
                "charts": {name: _number(row.chart(name)) for name in _charts(row)},
                "seconds": round(row.seconds, 1),
                "failed": dict(row.failures),
                "not_done": list(row.pending),
            }
            for row in of.rows
        ],
    }


def write(folder: Path, of: Table, base: Config, trials: Sequence[Trial]) -> None:
    """table.json and table.csv."""
    content = as_json(of, base, trials)
    (folder / "table.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["arm", "trials", of.score, "standard error", "seconds", "failed"])
        for row in of.rows:
            mean, error = (_number(v) for v in (row.mean, row.error))
            failed = len(row.failures)
            writer.writerow([row.arm.name, len(row.outcomes), mean, error, round(row.seconds, 1), failed])


def failures(folder: Path) -> dict[str, str]:
    """Trials that had failed when the table was written last → how."""
    try:
        rows = json.loads((folder / "table.json").read_text())["rows"]
    except (OSError, ValueError, KeyError):
        return {}
    told = {name: problem for row in rows for name, problem in row["failed"].items()}
    return {name: problem for name, problem in told.items() if problem != "not done"}  # as once written


def _leading(base: Config) -> str:
    """What the chart of the score to choose by is called."""
    metric = base.score.metrics[0] if base.score.metrics else ""
    if metric not in _LEADING:
        raise UserError("score.metrics: select chooses by the first of them, which has to be kid or fd.")
    return _LEADING[metric]


def _read(trial: Trial, leading: str) -> Outcome | None:
    """A finished trial's last score; None if it was never scored."""
    lines = rows(trial.folder / "metrics.jsonl", say)
    scored = [(row, key) for row in lines for key in row if _leads(key, leading)]
    if not scored:
        return None
    seconds, before = 0.0, 0
    for row in lines:
        if row.get("Timing/img_per_sec"):
            seconds += (row["cur_nimg"] - before) / row["Timing/img_per_sec"]
            before = row["cur_nimg"]
    row, key = scored[-1]
    return Outcome(trial, row[key], row, seconds)


def _leads(chart: str, leading: str) -> bool:
    return bool(re.fullmatch(leading, chart)) and not chart.endswith("_train")


def _check_references(found: Sequence[Outcome]) -> None:
    """Trials of one seed and fold must have been scored against the same images, by the same features."""
    seen: dict[tuple[int, int], tuple[Any, str]] = {}
    for outcome in found:
        file = outcome.trial.folder / "reference.json"
        about = json.loads(file.read_text())["heldout"] if file.is_file() else None
        other, name = seen.setdefault(outcome.place, (about, outcome.trial.name))
        if about != other:
            raise UserError(
                f"{outcome.trial.name} and {name} were scored against different images or features, and do "
                "not compare. Remove the older one's folder, and it is trained anew."
            )


def _charts(row: Row) -> list[str]:
    """What else is told of each arm: other scores, and what the penalty did to the weights."""
    names = dict.fromkeys(name for o in row.outcomes for name in o.last)
    wanted = ("Metrics/", *(f"{what}/{p}" for p in "GD" for what in ("Weights", "Gradients")))
    return [name for name in names if name.startswith(wanted)]


def _error(values: Sequence[float]) -> float:
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
