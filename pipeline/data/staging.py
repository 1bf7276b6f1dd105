"""Shards in the making: in a folder beside their own, which takes its name when everything is there.

Nothing half-written ever looks finished. Every shard leaves a note when it is whole, so that after a kill, or
on a disk that was full, the same command goes on with the shards that have none.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from pipeline.config import UserError
from pipeline.data.record import Shard

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PATIENCE = 2.0  # seconds: the workers of one that was killed hold the folder until they are gone
_NOTES, _RECIPE = ".progress", "recipe"


class Skipped(NamedTuple):
    """An image that could not be read. `place` is where in its shard it would be, `kind` what it is counted
    by."""

    place: int
    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Written:
    """One finished shard, the images that could not be read for it, and how often what was done to others."""

    shard: Shard
    skipped: tuple[Skipped, ...]
    facts: Mapping[str, int]


@contextmanager
def staging(target: Path, recipe: str) -> Iterator[Path]:
    """The folder to write to, ours alone. To be renamed to `target` when all is there.

    It holds what an earlier call with the same `recipe` has finished, and nothing else.
    """
    folder = target.with_name(f".{target.name}.partial")
    lock = _lock(folder, target)
    try:
        _clear(folder, recipe)
        yield folder
        shutil.rmtree(target / _NOTES)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise UserError(f"No space left for {target} ({error.strerror}). {_kept(folder)}") from None
    except BrokenProcessPool:
        raise UserError(
            "A process that prepares images was killed, most likely for want of memory. Run the same command "
            "again with fewer --workers: it goes on from there."
        ) from None
    except UserError:
        shutil.rmtree(folder, ignore_errors=True)  # what was asked for cannot be made
        raise
    finally:
        if not finished(folder):
            shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _lock(folder: Path, target: Path) -> int:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{target.parent} cannot be written to: {error.strerror}.") from None
    give_up = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            if time.monotonic() > give_up:
                os.close(lock)
                raise UserError(f"Another `shardgan prepare` is writing {target} at this moment.") from None
            time.sleep(0.05)


def _clear(folder: Path, recipe: str) -> None:
    note = folder / _NOTES / _RECIPE
    if note.exists() and note.read_text() == recipe:
        return
    for left in folder.iterdir():
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    note.parent.mkdir()
    note.write_text(recipe)


def finished(folder: Path) -> int:
    """How many shards are noted to be whole."""
    return len(list((folder / _NOTES).glob("*.json")))


def _kept(folder: Path) -> str:
    if not (count := finished(folder)):
        return "Nothing was kept of it; make room or choose another place, and run the command again."
    return (
        f"{count} finished shard{'s are' if count > 1 else ' is'} kept in {folder}: make room and run the "
        "same command again, which goes on from there, or remove that folder."
    )


def note(folder: Path, number: int, written: Written) -> None:
    """Shard `number` is whole."""
    path = folder / _NOTES / f"{number}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(written)))
    temporary.replace(path)


def noted(folder: Path, number: int) -> Written | None:
    """What was noted of a shard, if it is there as it was then."""
    try:
        values = json.loads((folder / _NOTES / f"{number}.json").read_text())
        labels = {int(label): count for label, count in values["shard"].pop("labels").items()}
        shard = Shard(**values["shard"], labels=labels)
        if shard.nsamples:
            with (folder / shard.url).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                    return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return Written(shard, tuple(Skipped(*item) for item in values["skipped"]), values["facts"])
