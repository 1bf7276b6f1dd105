"""changes.jsonl: settings and data that changed in mid-run, a line each: cur_nimg, key, old and new."""

from __future__ import annotations

from collections.abc import Iterable

from pipeline.run.rows import Row

CHANGES = "changes.jsonl"
DATA = "data"  # the key of a move to other data, or to another split of them


def data_since(recorded: Iterable[Row]) -> int:
    """The cur_nimg after which a run has its present data, by the lines of changes.jsonl; −1 if it always
    had. Earlier scores do not compare."""
    return max((int(row["cur_nimg"]) for row in recorded if row.get("key") == DATA), default=-1)
