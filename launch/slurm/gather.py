"""`python -m launch.slurm.gather FILE`: the runs listed in FILE, as a table (slurm/array.sbatch)."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline import config, console
from pipeline.config import UserError
from pipeline.run.folder import DONE, STOPPED, reference_of
from pipeline.run.references import differences
from pipeline.run.rows import rows


@dataclass
class Run:
    """A line of the list: the last value of everything that its run measured, and what scores are against."""

    name: str
    state: str
    last: dict[str, Any] = field(default_factory=dict)
    reference: dict[str, Any] = field(default_factory=dict)
    problem: str = ""
    mark: str = ""


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0 if all runs are done, 1 if not, 2 if the list cannot be read."""
    if len(arguments) != 1:
        print("error: which list? python -m launch.slurm.gather FILE", file=sys.stderr)
        return 2
    try:
        lines = Path(arguments[0]).read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
        print(f"error: {arguments[0]} cannot be read: {error}", file=sys.stderr)
        return 2
    runs = [_run(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not runs:
        print(f"error: {arguments[0]} lists no run; a line is: CONFIG [key=value …]", file=sys.stderr)
        return 2
    notes = list(_compare(runs))
    _show(runs)
    for text in [*notes, *(f"{run.name}: {run.problem}" for run in runs if run.problem)]:
        print(text)
    return 0 if all(run.state == "done" for run in runs) else 1


def _run(number: int, line: str) -> Run:
    try:
        path, *overrides = shlex.split(line)
        settings = config.load(path, overrides)
    except (UserError, ValueError) as error:  # the latter: a quote that is not closed
        return Run(f"line {number}", "cannot be read", problem=str(error))
    folder = Path(settings.run.out) / str(settings.run.name)
    last: dict[str, Any] = {}
    damaged: list[str] = []
    try:
        for row in rows(folder / "metrics.jsonl", damaged.append):
            last |= row
    except OSError as error:
        damaged.append(str(error))
    return Run(str(folder), _state(folder), last, reference_of(folder), "\n".join(damaged))


def _compare(runs: Sequence[Run]) -> Iterator[str]:
    """Mark the runs whose scores are against something else than the first one's, and say what."""
    scored = [run for run in runs if run.reference]
    for run in scored[1:]:
        apart = differences(scored[0].reference, run.reference)
        if apart:
            run.mark = " *"
            yield (
                f"* {run.name} is scored against other references than {scored[0].name}, and its scores do "
                f"not compare: {', '.join(apart)}"
            )


def _show(runs: Sequence[Run]) -> None:
    scores = dict.fromkeys(key for run in runs for key in run.last if key.startswith("Metrics/"))
    rows = [["run", "state", "kimg", *(key.removeprefix("Metrics/") for key in scores)]]
    for run in runs:
        numbers = (run.last.get(key) for key in ("Progress/kimg", *scores))
        rows.append([run.name + run.mark, run.state, *map(_shown, numbers)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _state(folder: Path) -> str:
    return "done" if (folder / DONE).exists() else "stopped" if (folder / STOPPED).exists() else "not done"


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


if __name__ == "__main__":
    console.take()
    sys.exit(main(sys.argv[1:]))
