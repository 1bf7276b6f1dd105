"""scores.json: what `shardgan evaluate` has found of a run's checkpoints, an entry per call."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.config import UserError
from pipeline.durable import write
from pipeline.lock import turn

_FILE = "scores.json"
Tell = Callable[[str], None]


def evaluated(folder: Path) -> list[dict[str, Any]]:
    """What has been added, newest first; none if the file is not there or damaged."""
    with suppress(OSError, ValueError):
        found = json.loads((folder / _FILE).read_bytes())
        if isinstance(found, list):
            return [entry for entry in reversed(found) if isinstance(entry, dict)]
    return []


def add(folder: Path, entry: Mapping[str, object], say: Tell, warn: Tell) -> None:
    """Atomically, one process at a time; warns if that fails. say: that it waits for another."""
    file = folder / _FILE
    try:
        with turn(file.with_name(".scores"), say):
            write(file, json.dumps([*_entries(file, warn), entry], indent=1) + "\n")
    except OSError as error:  # a full disk
        warn(f"these scores are not kept: {file} cannot be written to: {error.strerror or error}.")
    except UserError as error:  # another person's run, or one on a read-only disk
        warn(f"these scores are not kept: {error}")


def forget_after(folder: Path, cur_nimg: int, say: Tell) -> None:
    """Drop entries of later checkpoints, which are trained again, perhaps otherwise. Raises OSError."""
    file = folder / _FILE
    if not any(_at(entry) > cur_nimg for entry in evaluated(folder)):
        return
    with turn(file.with_name(".scores"), say):
        kept = [entry for entry in reversed(evaluated(folder)) if _at(entry) <= cur_nimg]
        write(file, json.dumps(kept, indent=1) + "\n")


def _at(entry: Mapping[str, Any]) -> int:
    at = entry.get("cur_nimg")
    return at if isinstance(at, int) else 0


def _entries(file: Path, warn: Tell) -> list[object]:
    """The list in `file`. A damaged file is kept under another name. Raises OSError."""
    with suppress(ValueError):
        entries = json.loads(file.read_bytes()) if file.exists() else []
        if isinstance(entries, list):
            return entries
    aside = file.with_name(f"{file.stem}.damaged.json")
    file.replace(aside)
    warn(f"{file} is damaged. It is kept as {aside}; a new one is written.")
    return []
