"""Files of JSON lines (metrics.jsonl, spectrum.jsonl): written whole or not at all, read whatever they hold.

A disk or machine may fail in the middle of a row. Then the file ends in half a row until the next write, and
readers skip that row.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.durable import write

_PATIENCE_S = 1.0
_TAIL = 64 * 1024  # bytes read at once in search of the last whole row

Row = dict[str, Any]
Complain = Callable[[str], object]


def rows(file: Path, complain: Complain = lambda _: None) -> list[Row]:
    """Every whole row in order; none if there is no file.

    complain: gets a line for each row that is not a JSON object with `cur_nimg`. Raises OSError if the file
    cannot be read.
    """
    return list(each_row(file, complain))


def each_row(file: Path, complain: Complain = lambda _: None) -> Iterator[Row]:
    """`rows`, one at a time: many weigh a gigabyte."""
    return (row for _, row in _parsed(file, complain) if row is not None)


def append(file: Path, row: Mapping[str, Any]) -> None:
    """Add a row, unless it is the last one already, after cutting off half a row at the end.

    Several processes may, as ranks do that fail together. Raises OSError if it is not all written; the next
    call cuts off what the disk kept of it.
    """
    data = json.dumps(row).encode() + b"\n"
    file_number = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    try:
        _lock(file_number)
        end = _cut_back(file_number)
        if end < len(data) or os.pread(file_number, len(data), end - len(data)) != data:
            _write(file_number, data, end)
    finally:
        with suppress(OSError):
            fcntl.flock(file_number, fcntl.LOCK_UN)  # also for a child that was forked just now
        os.close(file_number)  # on network file systems a write may fail here


def keep(file: Path, wanted: Callable[[Row], bool], complain: Complain = lambda _: None) -> None:
    """Keep only whole rows that are wanted. complain: as for `rows`. Raises OSError."""
    size, first, good = 0, 0, list[tuple[int, int]]()  # first: up to where every line is kept
    for line, row in _parsed(file, complain):
        if row is not None and line.endswith(b"\n") and wanted(row):
            good.append((size, size + len(line)))
            first += len(line) if first == size else 0
        size += len(line)
    if first == size:
        return
    if first == sum(end - start for start, end in good):  # needs no space, of which a full disk has none
        os.truncate(file, first)
    else:
        content = file.read_bytes()
        write(file, b"".join(content[start:end] for start, end in good))


def _lock(file_number: int) -> None:
    """Wait until no other process is in the middle of a row, or for a moment: it may be suspended."""
    end = time.monotonic() + _PATIENCE_S
    while time.monotonic() < end:
        try:
            fcntl.flock(file_number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.001)
        except OSError:  # a file system without locks
            return
        else:
            return


def _write(file_number: int, data: bytes, end: int) -> None:
    """In one write where the disk takes it, so that a kill comes before or after it. On an OSError nothing
    stays after `end`, unless the disk does not take that either."""
    left = data
    try:
        while left:
            left = left[os.write(file_number, left) :]
    except OSError:
        with suppress(OSError):
            os.ftruncate(file_number, end)
        raise


def _cut_back(file_number: int) -> int:
    """Cut the file off after its last whole row, and return where that is."""
    size = end = os.fstat(file_number).st_size
    while end:
        start = max(end - _TAIL, 0)
        found = os.pread(file_number, end - start, start).rfind(b"\n")
        end = start + found + 1 if found >= 0 else start
        if found >= 0:
            break
    if end < size:
        os.ftruncate(file_number, end)
    return end


def _parsed(file: Path, complain: Complain) -> Iterator[tuple[bytes, Row | None]]:
    """Each line of the file, and the row that it is; none without a file."""
    with suppress(FileNotFoundError), file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            row = _parse(line)
            if row is None and line != b"\n":
                complain(f"{file}, line {number} is damaged and is skipped: {_shown(line)}")
            yield line, row


def _parse(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
        named = {
            sys.intern(name): value for name, value in row.items()
        }  # or each row would hold its own names
        return {**named, "cur_nimg": int(row["cur_nimg"])}
    except (AttributeError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def _shown(line: bytes) -> str:
    text = line.decode(errors="replace").replace("\0", "").removesuffix("\n")
    return text if len(text) <= 60 else f"{text[:60]}…"
