"""What a selection says: the table on the terminal, report.md and best.yaml, beside the pictures."""

from __future__ import annotations

import dataclasses
import io
import math
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launch.select import files
from launch.select.choice import PAIRED, Row, ScoreTable
from launch.select.trials import Trial
from pipeline import config
from pipeline.credentials import redacted
from pipeline.wording import counted

if TYPE_CHECKING:
    from rich.table import Table as Lines

_NO_TERMINAL = 10_000  # columns: a log has as many as there are
_DIFFERENCE, _TIME = 3, 4  # where columns of the table on a terminal stand
_NAME = 24  # columns that a long name is folded to before others are left out


def terminal(found: ScoreTable) -> str:
    """The table, as wide as the terminal has room for ($COLUMNS, if set), what failed, and the choice."""
    from rich.console import Console

    width, out = shutil.get_terminal_size((_NO_TERMINAL, 24)).columns, io.StringIO()
    console = Console(file=out, width=width, color_system=None)
    unbounded = console.options.update(width=_NO_TERMINAL)
    for left_out in ([], [_TIME], [_TIME, _DIFFERENCE]):
        lines = _lines(found, left_out, _NAME)
        fits = console.measure(lines, options=unbounded).maximum <= width
        if fits:
            break
    console.print(_lines(found, left_out, fold_all=not fits))
    failed = [f"failed: {name}: {problem}" for name, problem in _failures(found)]
    rows = (line.rstrip() for line in out.getvalue().splitlines())
    return "\n".join([*rows, *failed, *verdict(found)])


def write(
    folder: Path, found: ScoreTable, trials: Sequence[Trial], path: str, overrides: Sequence[str]
) -> list[Path]:
    """best.yaml and report.md; returns what was written. Raises UserError if it cannot be."""
    choice = found.choice
    assert choice is not None
    base = config.load(path, overrides)
    best = config.load(path, [*overrides, *choice.arm.settings])
    best = dataclasses.replace(best, run=dataclasses.replace(best.run, name=f"{base.run.name}-best"))
    head = f"# {choice.arm.name}: chosen by `shardgan select`, see {folder}/report.md\n"
    files.write(folder / "best.yaml", head + config.dump(best))
    files.write(folder / "report.md", _report(found, trials))
    return [folder / "best.yaml", folder / "report.md"]


def _lines(
    found: ScoreTable, left_out: Sequence[int], name: int | None = None, fold_all: bool = False
) -> Lines:
    """The table without the columns left out, its first at most `name` wide."""
    from rich.box import SIMPLE
    from rich.markup import escape
    from rich.table import Table as Lines

    lines = Lines(box=SIMPLE)
    titles = _titles(found, others=[])
    shown = [i for i in range(len(titles)) if i not in left_out]
    for i in shown:
        lines.add_column(
            escape(titles[i]),
            justify="left" if i in (0, len(titles) - 1) else "right",
            no_wrap=i > 0 and not fold_all,
            overflow="fold",
            max_width=name if i == 0 else None,
        )
    for row in found.rows:
        cells = _cells(found, row, others=[])
        lines.add_row(*(escape(cells[i]) for i in shown))
    return lines


def _titles(found: ScoreTable, others: Sequence[str]) -> list[str]:
    first = found.rows[0].arm
    other = first.label if len(first.label) <= _NAME else "the first"
    return [first.title, "trials", found.score, f"minus {other}", *others, "time", ""]


def _others(found: ScoreTable) -> list[str]:
    """Further scores that stand in the table."""
    names = {
        name for row in found.rows for o in row.outcomes for name in o.last if name.startswith("Metrics/")
    }
    plain = (name.removeprefix("Metrics/") for name in sorted(names))
    return [name for name in plain if name != found.score and not name.endswith(("_images", "_train"))]


def _cells(found: ScoreTable, row: Row, others: Sequence[str]) -> list[str]:
    """What is said of one arm: of the trials that are compared, or of all its own if it is left out."""
    counts = ((len(row.failures), "failed"), (len(row.pending), "not done"))
    lacking = ", ".join(f"{count} {what}" for count, what in counts if count)
    marks = ((found.minimum, "best"), (found.choice, "chosen"))
    compared = {other.arm: other for other in found.comparable}
    first, of = (compared.get(other.arm, other) for other in (found.rows[0], row))
    return [
        row.arm.label,
        f"{len(row.outcomes)} ({lacking})" if lacking else f"{len(row.outcomes)}",
        _with_error(of.mean, of.error),
        "" if row is found.rows[0] else _with_error(*of.against(first), signed=True),
        *(_plain(of.chart(f"Metrics/{name}")) for name in others),
        f"{row.seconds / 60:.1f} min",
        ", ".join(text for one, text in marks if one and one.arm == row.arm),
    ]


def _with_error(value: float, error: float, signed: bool = False) -> str:
    """With three decimals, or more if the error has none among these."""
    if math.isnan(value):
        return "–"
    small = 0 < error < 5e-4 or (not error > 0 and 0 < abs(value) < 5e-4)
    decimals = min(9, 1 - math.floor(math.log10(error if error > 0 else abs(value)))) if small else 3
    text = f"{value:{'+' if signed else ''}.{decimals}f}"
    return text if math.isnan(error) else f"{text} ± {error:.{decimals}f}"


def _plain(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"


def _failures(found: ScoreTable) -> list[tuple[str, str]]:
    return [failure for row in found.rows for failure in row.failures.items()]


def verdict(found: ScoreTable) -> list[str]:
    """The choice, in words that claim no more than the trials show."""
    best, choice = found.minimum, found.choice
    pending = sum(len(row.pending) for row in found.rows)
    to_come = [f"Not done: {counted(pending, 'trial')}, which may change the choice."] if pending else []
    if best is None or choice is None:
        return ["Nothing to choose by yet: there is no trial that all candidates have finished.", *to_come]
    trials = len(best.outcomes)
    lines = [
        f"Chosen: {choice.arm.name}, {_reason(found, best, choice)}. Compared by {counted(trials, 'trial')} "
        "of each candidate.",
        *_distances(found, best, choice),
    ]
    if trials == 1:
        lines.append("With one trial there is no standard error: this is no more than a first look.")
    if found.left_out:
        names = ", ".join(row.arm.name for row in found.left_out)
        lines.append(f"Not compared, as trials of theirs failed: {names}.")
    return [*lines, *to_come]


def _reason(found: ScoreTable, best: Row, choice: Row) -> str:
    key = found.penalty
    if key is None or len(best.outcomes) == 1:
        return "which has the best mean"
    within = "within one standard error of"
    if choice.arm == best.arm:
        return f"which has the best mean; no larger {key} is {within} it, by the {found.rule} rule"
    return f"the largest {key} {within} the best mean ({best.arm.name}), by the {found.rule} rule"


def _distances(found: ScoreTable, best: Row, choice: Row) -> list[str]:
    """How far others are from the best."""
    lines = []
    if choice.arm != best.arm:
        difference = _with_error(*choice.against(best), signed=True)
        lines.append(f"{choice.arm.name} minus {best.arm.name}, in pairs: {difference}.")
    paired = dataclasses.replace(found, rule=PAIRED).choice
    if paired is not None and paired.arm != choice.arm:
        lines.append(f"The paired rule would choose {paired.arm.name}.")
    if found.penalty is None and found.within and len(best.outcomes) > 1:
        names = ", ".join(row.arm.name for row in found.within)
        lines.append(f"Within one standard error of it, by the {found.rule} rule: {names}.")
    return lines


def _rule(found: ScoreTable) -> str:
    """The rule that has chosen, in full."""
    if found.penalty is None:
        return "The best mean is chosen, as only the values of one λ stand in an order of regularisation."
    if found.rule == PAIRED:
        return (
            "The paired rule: of the candidates whose mean difference from the best, over trials of the same "
            "fold and seed, is at most one standard error of that difference, the largest λ is chosen."
        )
    return (
        "The unpaired rule: of the candidates whose mean is above the best one by at most the standard error "
        "of the best one's mean, the largest λ is chosen. That some folds are harder than others, for all "
        "candidates alike, counts as error here."
    )


def _report(found: ScoreTable, trials: Sequence[Trial]) -> str:
    settings = trials[0].settings
    others = _others(found)
    titles = _titles(found, others)
    done = sum(len(row.outcomes) for row in found.rows)
    hours = sum(row.seconds for row in found.rows) / 3600
    command = shlex.join(["shardgan", *map(redacted, sys.argv[1:])])
    lines = [
        f"# Selection {settings.track.group}",
        "",
        f"`{command}`: {done} of {counted(len(trials), 'trial')} finished, each of "
        f"{settings.run.total_kimg:g} kimg; {hours:.2f} hours of training in all. A trial is trained on all "
        f"but one of {counted(settings.data.folds or 0, 'fold')} and scored on that one; `±` is the standard "
        "error over trials, and `minus` the mean difference over trials of the same fold and seed.",
        "",
        *verdict(found),
        _rule(found),
        "",
        _line(titles),
        f"|{'---|' * len(titles)}",
        *(_line(_cells(found, row, others)) for row in found.rows),
        "",
        *(f"- failed: `{name}`: {problem}" for name, problem in _failures(found)),
        "",
        f"![{found.score} of each candidate, and what its G makes](curve.png)",
        "",
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
        *(_line([row.arm.label, *_weight_cells(row)]) for row in found.rows),
    ]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    """Of a table in Markdown."""
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _weight_cells(row: Row) -> list[str]:
    names = [f"Weights/{p}/norm" for p in "GD"] + [f"Gradients/{p}/penalty_share" for p in "GD"]
    return [_plain(row.chart(name)) for name in names]
