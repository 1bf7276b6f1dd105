"""`python -m launch.gather FILE`: how the runs listed in FILE stand, as a table (see slurm/array.sbatch)."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline import config
from pipeline.config import UserError
from pipeline.run.folder import DONE, STOPPED


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0 if all runs are done, 1 if not, 2 if the list cannot be read."""
    try:
        runs = [_run(line) for line in Path(arguments[0]).read_text().splitlines()]
    except (OSError, UserError, IndexError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    scores = dict.fromkeys(key for _, last in runs for key in last if key.startswith("Metrics/"))
    titles = ["run", "state", "kimg", *(key.removeprefix("Metrics/") for key in scores)]
    rows = [
        [
            str(folder),
            _state(folder),
            _shown(last.get("Progress/kimg")),
            *(_shown(last.get(k)) for k in scores),
        ]
        for folder, last in runs
    ]
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    for row in [titles, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0 if all((folder / DONE).exists() for folder, _ in runs) else 1


def _run(line: str) -> tuple[Path, dict[str, Any]]:
    """A run's folder, and the last value of everything that it measured."""
    path, *overrides = shlex.split(line)
    settings = config.load(path, overrides)
    folder = Path(settings.run.out) / str(settings.run.name)
    last: dict[str, Any] = {}
    try:
        for text in (folder / "metrics.jsonl").read_text().splitlines():
            last |= json.loads(text)
    except (OSError, ValueError):
        pass  # not begun, or cut short while it was written: what is whole counts
    return folder, last


def _state(folder: Path) -> str:
    return "done" if (folder / DONE).exists() else "stopped" if (folder / STOPPED).exists() else "not done"


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
