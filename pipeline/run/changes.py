"""changes.jsonl: settings and data that changed in mid-run, a line each: cur_nimg, key, old and new."""

from __future__ import annotations

from collections.abc import Iterable

from pipeline.run.rows import Row

CHANGES = "changes.jsonl"
DATA = "data"  # the key of a move to other data, or to another split of them


def data_since(recorded: Iterable[Row]) -> int:
    """The cur_nimg after which a run has its present data, by the lines of changes.jsonl; −1 if it always
    had. Earlier scores do not compare."""
    moves = list[Row]()
    for row in recorded:
        if row.get("key") != DATA:
            continue
        before = row["old"]
        while moves and moves[-1]["cur_nimg"] >= row["cur_nimg"]:  # it has fallen back, and trains that again
            before = moves.pop()["old"]
        if row["new"] != before:  # else it has returned before it trained on others
            moves.append({**row, "old": before})
    return int(moves[-1]["cur_nimg"]) if moves else -1
