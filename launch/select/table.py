"""The scores of a selection: read from the folders of its trials, written as table.json and table.csv."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.select import files
from launch.select.choice import PAIRED, Outcome, Row, ScoreTable
from launch.select.trials import Trial
from launch.select.verdict import conclusion
from pipeline.config import Config, UserError
from pipeline.run.folder import finished_at, reference_of
from pipeline.run.history import seconds_of
from pipeline.run.metrics import METRICS, leading_chart
from pipeline.run.references import differences
from pipeline.run.report import say
from pipeline.run.rows import rows


def read_table(
    base: Config, trials: Sequence[Trial], failures: Mapping[str, str], rule: str = PAIRED
) -> ScoreTable:
    """From whatever trials are finished.

    Raises UserError if trials of one seed and fold were scored against different images.
    """
    metric = _metric(base)
    found = {trial.name: _read(trial, metric) for trial in trials if trial.done}
    outcomes = [outcome for outcome in found.values() if outcome]
    _check_references(outcomes)
    failed = dict(failures) | {name: "it has no score" for name, outcome in found.items() if outcome is None}
    failed |= {o.trial.name: "its score is not a number" for o in outcomes if not math.isfinite(o.score)}
    table = [
        Row(
            arm,
            [o for o in outcomes if o.trial.arm == arm and math.isfinite(o.score)],
            {t.name: failed[t.name] for t in trials if t.arm == arm and t.name in failed},
            [t.name for t in trials if t.arm == arm and not t.done and t.name not in failed],
        )
        for arm in dict.fromkeys(t.arm for t in trials)
    ]
    score = leading_chart([metric], outcomes[0].last) if outcomes else None
    return ScoreTable((score or metric).removeprefix("Metrics/"), table, rule)


def check_scored(base: Config, trials: Sequence[Trial]) -> None:
    """Raises UserError for finished trials without the score that the config says to choose by."""
    metric = _metric(base)
    lacking = [trial for trial in trials if trial.done and _read(trial, metric) is None]
    if lacking:
        have = [name for name in METRICS if all(_read(trial, name) for trial in lacking)]
        more = f", as are {len(lacking) - 1} more" if len(lacking) > 1 else ""
        remedy = f"Set score.metrics=[{', '.join(have)}], which they have" if have else "Remove its folder"
        raise UserError(
            f"{lacking[0].name} is finished without the score to choose by, {metric}, which is the first of "
            f"score.metrics{more}. {remedy}, or give the selection another run.name."
        )


def as_json(table: ScoreTable, base: Config, trials: Sequence[Trial]) -> dict[str, Any]:
    """Everything in the table, and the choice. Not a number is null."""
    best, chosen = table.minimum, table.choice
    compared = {row.arm for row in table.comparable}
    seen, lines = table.seen, table.lines
    first = seen[table.rows[0].arm]
    return {
        "score": table.score,
        "total_kimg": base.run.total_kimg,
        "trials": len(trials),
        "finished": sum(len(row.outcomes) for row in table.rows),
        "compared": len(best.outcomes) if best else 0,  # trials of each candidate
        "rule": table.rule,
        "minimum": best.arm.name if best else None,
        "chosen": chosen.arm.name if chosen else None,
        "one_standard_error": chosen.arm.name if chosen else None,  # the former name of "chosen"
        "conclusion": conclusion(table),
        "by_budget": [{"kimg": kimg, "chosen": row.arm.name} for kimg, row in table.by_budget],
        "rows": [
            {
                "arm": row.arm.name,
                "settings": list(row.arm.settings),
                "finished": len(row.outcomes),
                "mean_over": len(seen[row.arm].outcomes),  # trials
                "mean": _number(seen[row.arm].mean),
                "standard_error": _number(seen[row.arm].error),
                f"minus {first.arm.name}": [*map(_number, seen[row.arm].against(first))],
                "minus_minimum": [*map(_number, seen[row.arm].against(best))]
                if best and row.arm in compared
                else None,
                "by_trial": {o.trial.name: o.score for o in row.outcomes},
                "by_kimg": [_point(kimg, then) for kimg, then in lines[row.arm].items()],
                "charts": {name: _number(seen[row.arm].chart(name)) for name in _charts(seen[row.arm])},
                "seconds": round(row.seconds, 1),
                "failed": dict(row.failures),
                "not_done": list(row.pending),
            }
            for row in table.rows
        ],
    }


def write(folder: Path, table: ScoreTable, base: Config, trials: Sequence[Trial]) -> None:
    """table.json and table.csv. Raises UserError if they cannot be written."""
    content = as_json(table, base, trials)
    files.write(folder / "table.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    lines = io.StringIO(newline="")
    writer = csv.writer(lines)
    writer.writerow(["arm", "trials", table.score, "standard error", "seconds", "failed", "mean over"])
    for row in content["rows"]:
        numbers = (row[key] for key in ("arm", "finished", "mean", "standard_error", "seconds"))
        writer.writerow([*numbers, len(row["failed"]), row["mean_over"]])
    files.write(folder / "table.csv", lines.getvalue())


def failures(folder: Path) -> dict[str, str]:
    """Trials that had failed when the table was last written → how."""
    failed = {name: problem for row in _rows(folder) for name, problem in row["failed"].items()}
    return {name: problem for name, problem in failed.items() if problem != "not done"}  # as once written


def listed(folder: Path) -> set[str]:
    """The trials of the table that was last written, done or not."""
    return {
        name
        for row in _rows(folder)
        for part in ("by_trial", "failed", "not_done")
        for name in row.get(part, ())
    }


def _rows(folder: Path) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = json.loads((folder / "table.json").read_text(encoding="utf-8"))["rows"]
    except (OSError, ValueError, KeyError):
        return []
    return rows


def _metric(base: Config) -> str:
    """The metric to choose by."""
    metric = base.score.metrics[0] if base.score.metrics else ""
    known = [name for name, entry in METRICS.items() if entry.leads]
    if metric not in known:
        raise UserError(f"score.metrics: select chooses by the first, which has to be {' or '.join(known)}.")
    return metric


def _read(trial: Trial, metric: str) -> Outcome | None:
    """A finished trial's score; None if it was not scored at its end."""
    lines = rows(trial.folder / "metrics.jsonl", say)
    scored = [(row, chart) for row in lines if (chart := leading_chart([metric], row))]
    if not scored or scored[-1][0]["cur_nimg"] < finished_at(trial.folder):
        return None
    row, chart = scored[-1]
    return Outcome(trial, row[chart], row, seconds_of(lines), _by_kimg(trial.config, scored))


def _by_kimg(config: Config, scored: Sequence[tuple[Mapping[str, Any], str]]) -> dict[float, float]:
    """Budget → score. A budget is a multiple of run.eval_kimg, whatever batches make of it; the last score is
    that of the end. Scores at other times are left out, such as those before run.eval_kimg was changed, and
    that of the untrained networks."""
    each, total = 1000 * config.run.eval_kimg, config.run.total_kimg
    found = {}
    for row, chart in scored[:-1]:
        number = math.floor(row["cur_nimg"] / each + 1e-9)
        kimg = float(f"{number * config.run.eval_kimg:.9g}")
        on_time = row["cur_nimg"] - number * each < config.images_per_update
        if number and on_time and kimg < total and math.isfinite(row[chart]):
            found[kimg] = row[chart]
    row, chart = scored[-1]
    return found | {total: row[chart]}


def _point(kimg: float, then: Row) -> dict[str, Any]:
    """Of an arm's learning curve."""
    mean, error = _number(then.mean), _number(then.error)
    return {"kimg": kimg, "trials": len(then.outcomes), "mean": mean, "standard_error": error}


def _check_references(outcomes: Sequence[Outcome]) -> None:
    """Trials of one seed and fold must have been scored against the same images, by the same features."""
    seen: dict[tuple[int, int], tuple[dict[str, Any], str]] = {}
    for outcome in outcomes:
        about = {"heldout": reference_of(outcome.trial.folder).get("heldout", {})}
        other, name = seen.setdefault(outcome.place, (about, outcome.trial.name))
        if differences(other, about):
            raise UserError(
                f"{outcome.trial.name} and {name} were scored against different images or features, and do "
                "not compare. Remove the older one's folder, and it is trained again."
            )


def _charts(row: Row) -> list[str]:
    """The charts shown of each arm: other scores, and what the penalty did to the weights."""
    names = dict.fromkeys(name for o in row.outcomes for name in o.last)
    wanted = ("Metrics/", *(f"{what}/{p}" for p in "GD" for what in ("Weights", "Gradients")))
    return [name for name in names if name.startswith(wanted)]


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
