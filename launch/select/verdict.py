"""The verdict of a selection in words: the table on the terminal, report.md and best.yaml."""

from __future__ import annotations

import dataclasses
import io
import math
import shlex
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Literal

from launch.select import files
from launch.select.choice import PAIRED, SEARCHED, Row, ScoreTable
from launch.select.trials import Trial
from pipeline.config import dump, load
from pipeline.credentials import redacted
from pipeline.wording import NO_TERMINAL, columns, counted, in_kimg, in_markdown

_DIFFERENCE, _TIME = 3, 4  # columns that are left out first on a narrow terminal
_NAME = 24  # letters of the first column until others are left out
_NARROWEST = 8  # letters of it until numbers are broken
_NAMED = 5  # candidates in a sentence


def terminal(table: ScoreTable) -> str:
    """The table, as wide as the terminal ($COLUMNS, if set) allows, what failed, and the choice."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    width, out = columns(), io.StringIO()
    console = Console(file=out, width=width, color_system=None)
    unbounded = console.options.update(width=NO_TERMINAL)
    titles = _titles(table, others=[])

    def lines(left_out: Sequence[int], name: int | None, fold_all: bool = False) -> Table:
        """The table without some columns, its first at most `name` wide."""
        shown = [i for i in range(len(titles)) if i not in left_out]
        grid = Table(box=SIMPLE)
        for i in shown:
            justify: Literal["left", "right"] = "left" if i in (0, len(titles) - 1) else "right"
            fold, most = i == 0 or fold_all, name if i == 0 else None
            grid.add_column(
                escape(titles[i]), justify=justify, no_wrap=not fold, overflow="fold", max_width=most
            )
        for row in table.rows:
            cells = _cells(table, row, others=[])
            grid.add_row(*(escape(cells[i]) for i in shown))
        return grid

    def fits(left_out: Sequence[int], name: int) -> bool:
        return console.measure(lines(left_out, name), options=unbounded).maximum <= width

    ways: tuple[list[int], ...] = ([], [_TIME], [_TIME, _DIFFERENCE])
    left_out = next((way for way in ways if fits(way, _NAME)), ways[-1])
    console.print(lines(left_out, None, fold_all=not fits(left_out, _NARROWEST)))
    failed = [f"failed: {name}: {problem}" for name, problem in _failures(table)]
    return "\n".join([*map(str.rstrip, out.getvalue().splitlines()), *failed, *sentences(table)])


def write(
    folder: Path, table: ScoreTable, trials: Sequence[Trial], path: str, overrides: Sequence[str]
) -> list[Path]:
    """best.yaml and report.md; returns what was written. Raises UserError if it cannot be."""
    choice = table.choice
    assert choice is not None
    best = load(path, [*overrides, *choice.arm.settings])
    best = dataclasses.replace(best, run=dataclasses.replace(best.run, name=f"{folder.name}-best"))
    head = f"# {choice.arm.name}: chosen by `shardgan select`, see {folder}/report.md\n"
    files.write(folder / "best.yaml", head + dump(best))
    files.write(folder / "report.md", markdown(table, trials))
    return [folder / "best.yaml", folder / "report.md"]


def _titles(table: ScoreTable, others: Sequence[str]) -> list[str]:
    first = table.rows[0].arm
    other = first.label if len(first.label) <= _NAME else "the first"
    return [first.title, "trials", table.score, f"minus {other}", *others, "time", ""]


def _others(table: ScoreTable) -> list[str]:
    """Further scores in the table."""
    charts = {name for row in table.rows for o in row.outcomes for name in o.last}
    names = [name.removeprefix("Metrics/") for name in sorted(charts) if name.startswith("Metrics/")]
    return [name for name in names if name != table.score and not name.endswith(("_images", "_train"))]


def _cells(table: ScoreTable, row: Row, others: Sequence[str]) -> list[str]:
    """The line of one arm."""
    counts = ((len(row.failures), "failed"), (len(row.pending), "not done"))
    lacking = ", ".join(f"{count} {what}" for count, what in counts if count)
    marks = ((table.minimum, "best"), (table.choice, "chosen"))
    first, mine = (table.seen[other.arm] for other in (table.rows[0], row))
    return [
        row.arm.label,
        f"{len(row.outcomes)} ({lacking})" if lacking else f"{len(row.outcomes)}",
        with_error(mine.mean, mine.error),
        "" if row is table.rows[0] else with_error(*mine.against(first), signed=True),
        *(_plain(mine.chart(f"Metrics/{name}")) for name in others),
        f"{row.seconds / 60:.1f} min",
        ", ".join(text for one, text in marks if one and one.arm == row.arm),
    ]


def with_error(value: float, error: float, signed: bool = False) -> str:
    """With three decimals, or more if the error would show as 0."""
    if math.isnan(value):
        return "–"
    small = 0 < error < 5e-4 or (not error > 0 and 0 < abs(value) < 5e-4)
    decimals = min(9, 1 - math.floor(math.log10(error if error > 0 else abs(value)))) if small else 3
    text = f"{value:{'+' if signed else ''}.{decimals}f}"
    return text if math.isnan(error) else f"{text} ± {error:.{decimals}f}"


def _plain(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"


def _failures(table: ScoreTable) -> list[tuple[str, str]]:
    return [failure for row in table.rows for failure in row.failures.items()]


def conclusion(table: ScoreTable) -> list[str]:
    """The choice and the rule it follows, in sentences."""
    return [*sentences(table), *([_rule(table)] if table.choice else [])]


def sentences(table: ScoreTable) -> list[str]:
    """The choice, in words that claim no more than the trials show."""
    best, choice = table.minimum, table.choice
    pending = sum(len(row.pending) for row in table.rows)
    to_come = [f"Not done: {counted(pending, 'trial')}, which may change the choice."] if pending else []
    if best is None or choice is None:
        return ["Nothing to choose by yet: there is no trial that all candidates have finished.", *to_come]
    trials = len(best.outcomes)
    lines = [
        f"Chosen: {choice.arm.name}, {_reason(table, best, choice)}. Compared by {counted(trials, 'trial')} "
        "of each candidate.",
        *_distances(table, best, choice),
        *_along_the_way(table),
    ]
    if math.isnan(best.error):
        lines.append("With one fold per seed there is no standard error: this is no more than a first look.")
    if table.left_out:
        lines.append(f"Not compared, as trials of theirs failed: {_listed(table.left_out)}.")
    return [*lines, *to_come]


def _reason(table: ScoreTable, best: Row, choice: Row) -> str:
    key = table.penalty
    if key is None or math.isnan(best.error):
        return "which has the best mean"
    within = "within one standard error of"
    largest = (
        f"; it is the largest {key} tried, so try larger ones" if _is_largest(choice, table.rows) else ""
    )
    if choice.arm != best.arm:
        reason = f"the largest {key} {within} the best mean ({best.arm.name}), by the {table.rule} rule"
        return reason + largest
    if _is_largest(choice, table.comparable):
        return f"which has the best mean{largest or f'; no larger {key} could be compared'}"
    return f"which has the best mean; no larger {key} is {within} it, by the {table.rule} rule"


def _is_largest(choice: Row, rows: Sequence[Row]) -> bool:
    """Whether none of these candidates, of one λ, has a larger one."""
    values = {row.arm: row.arm.number(next(iter(row.arm.values))) or 0 for row in rows}
    return values[choice.arm] == max(values.values())


def _distances(table: ScoreTable, best: Row, choice: Row) -> list[str]:
    """How far others are from the best."""
    lines = []
    if choice.arm != best.arm:
        difference = with_error(*choice.against(best), signed=True)
        lines.append(f"{choice.arm.name} minus {best.arm.name}, in pairs: {difference}.")
    if table.rule == SEARCHED:
        if choice.arm != (first := table.rows[0]).arm and len(choice.outcomes) > 1:
            difference = with_error(*choice.against(first), signed=True)
            lines.append(f"{choice.arm.name} minus {first.arm.name}, in pairs: {difference}.")
    else:
        paired = dataclasses.replace(table, rule=PAIRED).choice
        if paired is not None and paired.arm != choice.arm:
            lines.append(f"The paired rule would choose {paired.arm.name}.")
    if table.penalty is None and table.within and not math.isnan(best.error):
        rule = "in pairs" if table.rule == SEARCHED else f"by the {table.rule} rule"
        lines.append(f"Within one standard error of it, {rule}: {_listed(table.within)}.")
    return lines


def _along_the_way(table: ScoreTable) -> list[str]:
    """What trainings that had ended earlier would have chosen, if they were scored then."""
    chosen = table.by_budget
    if len(chosen) < 2:
        return []
    spans = [
        (arm.name, [kimg for kimg, _ in span]) for arm, span in groupby(chosen, key=lambda one: one[1].arm)
    ]
    if len(spans) == 1:
        return [f"The same is chosen by the scores at {_span(spans[0][1])} kimg."]
    if len(spans) > _NAMED:
        return ["The choice changes with the budget, back and forth: see the learning curves in report.md."]
    listed = [f"{name} at {_span(kimgs)} kimg" for name, kimgs in spans]
    return [f"The choice by budget: {', then '.join(listed)}."]


def _span(kimgs: Sequence[float]) -> str:
    return f"{kimgs[0]:g}" if len(kimgs) == 1 else f"{kimgs[0]:g} to {kimgs[-1]:g}"


def _listed(rows: Sequence[Row]) -> str:
    """Names, the best first; of many, the first few."""
    names = [row.arm.name for row in sorted(rows, key=lambda row: row.mean)]
    rest = len(names) - _NAMED
    return f"{'; '.join(names[:_NAMED])}; and {rest} more" if rest > 0 else ", ".join(names)


def _rule(table: ScoreTable) -> str:
    """The rule that has chosen, in full."""
    if table.rule == SEARCHED:
        return (
            "The best mean of the candidates whose trials have all finished is chosen. As the lowest of "
            f"{len(table.comparable)} it is probably lower than with other folds or seeds."
        )
    if table.penalty is None:
        return (
            "The best mean is chosen, as only the values of one λ are known to be ordered by regularisation."
        )
    if table.rule == PAIRED:
        return (
            "The paired rule: of the candidates whose mean difference from the best, over trials of the same "
            "fold and seed, is at most one standard error, both of that difference and of the best one's own "
            "mean, the largest λ is chosen."
        )
    return (
        "The unpaired rule: of the candidates whose mean is above the best one by at most the standard error "
        "of the best one's mean, the largest λ is chosen. That some folds are harder than others, for all "
        "candidates alike, counts as error here."
    )


def markdown(table: ScoreTable, trials: Sequence[Trial]) -> str:
    """The text of report.md."""
    config = trials[0].config
    others = _others(table)
    titles = _titles(table, others)
    done = sum(len(row.outcomes) for row in table.rows)
    hours = sum(row.seconds for row in table.rows) / 3600
    command = shlex.join(["shardgan", *map(redacted, sys.argv[1:])])
    lines = [
        f"# Selection {config.track.group}",
        "",
        f"`{command}`: {done} of {counted(len(trials), 'trial')} finished, each of "
        f"{in_kimg(config.run.total_kimg)} kimg; {hours:.2f} hours of training in all. A trial is trained on "
        f"all but one of {counted(config.data.folds or 0, 'fold')} and scored on that one; `±` is the "
        "standard error over the folds of a seed, or over seeds if it is larger, and `minus` the mean "
        "difference over trials of the same fold and seed.",
        "",
        *conclusion(table),
        "",
        _line(titles),
        f"|{'---|' * len(titles)}",
        *(_line(_cells(table, row, others)) for row in table.rows),
        "",
        *(f"- failed: `{name}`: {problem}" for name, problem in _failures(table)),
        "",
        f"![{table.score} of each candidate, and what its G makes](curve.png)",
        "",
        *_pictured(table),
        "`best.yaml` is the config with the chosen settings, ready for `shardgan train`.",
        "",
        "## What it did to the weights",
        "",
        "Norms of kernels over training, the penalty's gradient as a share of the whole (above 1 where the",
        "loss pulls against it), and the singular values of the largest kernel at the end; one trial each.",
        "",
        "![Norms of kernels, share of the gradient, spectra](weights.png)",
        "",
        "| candidate | ‖W_G‖ | ‖W_D‖ | share of G's gradient | share of D's gradient |",
        "|---|---|---|---|---|",
        *(_line([row.arm.label, *_weight_cells(row)]) for row in table.rows),
    ]
    return "\n".join(lines) + "\n"


def _pictured(table: ScoreTable) -> list[str]:
    """The parts of report.md for a search, a grid over two keys, and scores along the way."""
    lines = []
    if table.rule == SEARCHED:
        alt = f"{table.score} of what was proposed, and the best so far"
        lines += ["## The search", "", f"![{alt}](search.png)", ""]
    if table.plane:
        lines += ["## The grid", "", f"![Mean {table.score} of each pair of values](grid.png)", ""]
    if len(table.by_budget) > 1:
        budgets = [
            [in_kimg(kimg), row.arm.name, with_error(row.mean, row.error), str(len(row.outcomes))]
            for kimg, row in table.by_budget
        ]
        lines += [
            "## Learning curves",
            "",
            "Means over trials; bands show their standard error. The table has what the same rule would",
            "choose by the scores there.",
            "",
            f"![{table.score} of each candidate over training](learning.png)",
            "",
            _line(["kimg", "chosen", table.score, "trials"]),
            "|---|---|---|---|",
            *map(_line, budgets),
            "",
        ]
    return lines


def _line(cells: Sequence[str]) -> str:
    """Of a table in Markdown."""
    return f"| {' | '.join(map(in_markdown, cells))} |"


def _weight_cells(row: Row) -> list[str]:
    names = [f"Weights/{p}/norm" for p in "GD"] + [f"Gradients/{p}/penalty_share" for p in "GD"]
    return [_plain(row.chart(name)) for name in names]
