"""changes.jsonl: settings and data that changed in mid-run, a line each: cur_nimg, key, old and new."""

from __future__ import annotations

from collections.abc import Iterable
from operator import itemgetter

from pipeline.run.rows import Row

CHANGES = "changes.jsonl"
DATA = "data"  # the key of a move to other data, or to another split of them


def data_since(recorded: Iterable[Row]) -> int:
    """The cur_nimg after which a run has its present data, by the lines of changes.jsonl; −1 if it always
    had. Earlier scores do not compare."""
    moves = _changes(recorded, DATA)
    return int(moves[-1]["cur_nimg"]) if moves else -1


def settings_changed(recorded: Iterable[Row], cur_nimg: int) -> list[Row]:
    """The settings that were not the same in all of a training up to cur_nimg: a row for each change."""
    recorded = [row for row in recorded if {"key", "old", "new"} <= row.keys() and row["key"] != DATA]
    keys = dict.fromkeys(row["key"] for row in recorded)
    found = [row for key in keys for row in _changes(recorded, key) if 0 < row["cur_nimg"] < cur_nimg]
    return sorted(found, key=itemgetter("cur_nimg"))


def _changes(recorded: Iterable[Row], key: str) -> list[Row]:
    """Those of a key, in their order, with which it trained."""
    found = list[Row]()
    for row in recorded:
        if row.get("key") != key:
            continue
        before = row["old"]
        while found and found[-1]["cur_nimg"] >= row["cur_nimg"]:  # it has fallen back, and trains that again
            before = found.pop()["old"]
        if row["new"] != before:  # else it has returned before it trained with another value
            found.append({**row, "old": before})
    return found
