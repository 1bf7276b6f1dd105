"""What a selection says: the table on the terminal, report.md and best.yaml, beside the pictures."""

from __future__ import annotations

import dataclasses
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.select.plots import curve, weights
from launch.select.table import Row, Table
from launch.select.trials import Trial
from pipeline import config
from pipeline.credentials import redacted


def show(found: Table) -> None:
    """The table on the terminal."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table as Lines

    lines = Lines(box=SIMPLE)
    titles = _titles(found, others=[])
    for title in titles:
        left = title in (titles[0], "")
        lines.add_column(escape(title), justify="left" if left else "right", no_wrap=True)
    for row in found.rows:
        lines.add_row(*map(escape, _cells(found, row, others=[])))
    Console(width=max(100, Console().width)).print(lines)  # a log has no width
    for name, problem in _failures(found):
        print(f"failed: {name}: {problem}")
    print("\n".join(_verdict(found)))


def write(
    folder: Path, found: Table, trials: Sequence[Trial], path: str, overrides: Sequence[str]
) -> list[Path]:
    """report.md and best.yaml, curve.png and weights.png; returns what was written."""
    choice = found.choice
    assert choice is not None
    base = config.load(path, overrides)
    best = config.load(path, [*overrides, *choice.arm.settings])
    best = dataclasses.replace(best, run=dataclasses.replace(best.run, name=f"{base.run.name}-best"))
    head = f"# {choice.arm.name}: chosen by `shardgan select`, see {folder}/report.md\n"
    (folder / "best.yaml").write_text(head + config.dump(best))
    (folder / "report.md").write_text(_report(found, trials))
    curve(found, folder / "curve.png")  # last, as they need the trials' checkpoints and the data
    weights(found, folder / "weights.png")
    return [folder / name for name in ("report.md", "curve.png", "weights.png", "best.yaml", "table.json")]


def _titles(found: Table, others: Sequence[str]) -> list[str]:
    keys = {key for row in found.rows for key in row.arm.values}
    what = keys.pop() if len(keys) == 1 else "candidate"
    return [what, "trials", found.score, f"minus {found.rows[0].label}", *others, "time", ""]


def _others(found: Table) -> list[str]:
    """Further scores that stand in the table."""
    names = {
        name for row in found.rows for o in row.outcomes for name in o.last if name.startswith("Metrics/")
    }
    plain = (name.removeprefix("Metrics/") for name in sorted(names))
    return [name for name in plain if name != found.score and not name.endswith(("_images", "_train"))]


def _cells(found: Table, row: Row, others: Sequence[str]) -> list[str]:
    first = found.rows[0]
    picked = ((found.minimum, "min"), (found.choice, "chosen"))
    counts = ((len(row.failures), "failed"), (len(row.pending), "not done"))
    lacking = ", ".join(f"{count} {what}" for count, what in counts if count)
    return [
        row.label,
        f"{len(row.outcomes)} ({lacking})" if lacking else f"{len(row.outcomes)}",
        _with_error(row.mean, row.error),
        "" if row is first else _with_error(*row.against(first), signed=True),
        *(_plain(row.chart(f"Metrics/{name}")) for name in others),
        f"{row.seconds / 60:.1f} min",
        ", ".join(text for one, text in picked if one and one.arm == row.arm),
    ]


def _with_error(value: float, error: float, signed: bool = False) -> str:
    if math.isnan(value):
        return "–"
    text = f"{value:+.3f}" if signed else f"{value:.3f}"
    return text if math.isnan(error) else f"{text} ± {error:.3f}"


def _plain(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"


def _failures(found: Table) -> list[tuple[str, str]]:
    return [failure for row in found.rows for failure in row.failures.items()]


def _verdict(found: Table) -> list[str]:
    """The choice, in words that claim no more than the trials show."""
    best, choice = found.minimum, found.choice
    pending = sum(len(row.pending) for row in found.rows)
    to_come = [f"{pending} trials are not done: what they find may change the choice."] if pending else []
    if best is None or choice is None:
        return ["Nothing to choose by yet: there is no trial that all candidates have finished.", *to_come]
    left_out = [row.arm.name for row in found.rows if row.arm not in [r.arm for r in found.comparable]]
    trials = len(best.outcomes)
    lines = [
        f"Minimum: {best.arm.name}. One-standard-error rule: {choice.arm.name}. By {trials} "
        f"trial{'s' if trials > 1 else ''} of each.",
        *_price(best, choice),
    ]
    if trials == 1:
        lines.append("With one trial there is no standard error: this is no more than a first look.")
    if left_out:
        lines.append(f"Out of the question, as trials of theirs failed: {', '.join(left_out)}.")
    return [*lines, *to_come]


def _price(best: Row, choice: Row) -> list[str]:
    """What the rule gives away: in a standard error between folds a plain loss in each of them may hide."""
    if choice.arm == best.arm:
        return []
    difference, error = choice.against(best)
    lines = [
        f"{choice.arm.name} minus {best.arm.name}, fold by fold: "
        f"{_with_error(difference, error, signed=True)}."
    ]
    if difference > 2 * error:  # never, if there is none
        lines.append(
            f"In these folds {choice.arm.name} is worse than {best.arm.name}, by more than two standard "
            "errors of that difference."
        )
    return lines


def _report(found: Table, trials: Sequence[Trial]) -> str:
    settings = trials[0].settings
    others = _others(found)
    titles = _titles(found, others)
    done = sum(len(row.outcomes) for row in found.rows)
    hours = sum(row.seconds for row in found.rows) / 3600
    command = shlex.join(["shardgan", *map(redacted, sys.argv[1:])])
    lines = [
        f"# Selection {settings.track.group}",
        "",
        f"`{command}`: {done} of {len(trials)} trials finished, each of "
        f"{settings.run.total_kimg:g} kimg; {hours:.2f} hours of training in all. A trial is trained on all "
        f"but one of {settings.data.folds} folds and scored on that one; `±` is the standard error over "
        f"trials, and `minus` the difference over trials of the same fold and seed.",
        "",
        *_verdict(found),
        f"Of candidates within one standard error of the minimum the rule takes {found.order}.",
        "",
        _line(titles),
        f"|{'---|' * len(titles)}",
        *(_line(_cells(found, row, others)) for row in found.rows),
        "",
        *(f"- failed: `{name}`: {problem}" for name, problem in _failures(found)),
        "",
        f"![{found.score} of each candidate, and what its G makes](curve.png)",
        "",
        "`best.yaml` is the choice of the one-standard-error rule, ready for `shardgan train`.",
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
        *(_line([row.label, *_weight_cells(row)]) for row in found.rows),
    ]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    """Of a table in Markdown."""
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _weight_cells(row: Row) -> list[str]:
    names = [f"Weights/{p}/norm" for p in "GD"] + [f"Gradients/{p}/penalty_share" for p in "GD"]
    return [_plain(row.chart(name)) for name in names]
