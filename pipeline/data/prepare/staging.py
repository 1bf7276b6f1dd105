"""Shards that are being made: in a folder beside the target, which is renamed when everything is there.

Nothing half-written ever looks finished. Every finished shard is recorded, so that after a kill, or a full
disk, the same command makes only the shards that are missing.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from pipeline import durable
from pipeline.config import UserError
from pipeline.data.record import Shard
from pipeline.lock import LOCK, HeldError, Lock, LockLostError, take

_RECORDS, _RECIPE = ".progress", "recipe"


class Skipped(NamedTuple):
    """An image that could not be read. `place`: its place in its shard; a summary counts by `kind`."""

    place: int
    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Written:
    """One finished shard, the images that could not be read for it, and counts of what was done to others."""

    shard: Shard
    skipped: tuple[Skipped, ...]
    facts: Mapping[str, int]


@contextmanager
def staging(target: Path, recipe: str, announce: Callable[[str], None] = lambda _: None) -> Iterator[Path]:
    """The folder to write to, locked for this process. `publish` renames it to `target` when all is there.

    It holds what an earlier call with the same `recipe` has finished, and nothing else. Raises
    MadeMeanwhileError if `target` holds something.
    """
    global _lock
    folder = target.with_name(f".{target.name}.partial")
    _lock = _take(folder, target, announce)
    try:
        if target.is_dir() and any(target.iterdir()):
            raise MadeMeanwhileError(f"Another `shardgan prepare` has just made {target}.")
        _clear(folder, recipe)
        yield folder
        shutil.rmtree(target / _RECORDS)
        shutil.rmtree(target / LOCK)
    except OSError as error:
        _lock.check()  # the disk has not failed if another process removed the files
        if error.errno not in durable.FULL:
            raise
        raise UserError(f"No space left for {target} ({error.strerror}). {_kept(folder)}") from None
    except BrokenProcessPool:
        raise UserError(
            "A process that prepares images was killed, most likely out of memory. Run the same command "
            "again with fewer --workers: it makes only what is missing."
        ) from None
    except (LockLostError, _NotPublishedError, NotStartedError):
        raise
    except UserError:
        discard(folder)  # the images or options are wrong: nothing in it is of use
        raise
    finally:
        if not finished(folder):
            discard(folder)
        _lock.release()


_lock: Lock  # of the folder that this process, or the one it is a worker of, writes to


def _take(folder: Path, target: Path, announce: Callable[[str], None]) -> Lock:
    try:
        return take(folder, announce)
    except HeldError as error:
        raise UserError(
            f"Another `shardgan prepare` is writing {target} at this moment: {error.holder}."
        ) from None


def discard(path: Path) -> None:
    """Remove a file or folder, unless another process has the lock now."""
    with suppress(LockLostError):
        _lock.check()
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


class MadeMeanwhileError(UserError):
    """The target, which was not there when the caller looked, is there."""


class NotStartedError(UserError):
    """Processes could not be started; what earlier ones have made is kept."""


class _NotPublishedError(UserError):
    """Everything was made, and is kept."""


def publish(folder: Path, target: Path) -> None:
    """Rename the finished folder. Raises UserError if that fails."""
    _lock.check()
    try:
        folder.replace(target)
    except OSError as error:
        raise _NotPublishedError(
            f"All shards are in {folder}, which could not be renamed to {target}: {error.strerror}."
        ) from None


def _clear(folder: Path, recipe: str) -> None:
    kept = folder / _RECORDS / _RECIPE
    same = kept.exists() and kept.read_text() == recipe
    for left in folder.iterdir():
        if left.name == LOCK or (same and not _is_unfinished(left)):
            continue
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    if not same:
        kept.parent.mkdir()
        kept.write_text(recipe)


def _is_unfinished(path: Path) -> bool:
    """A shard without a record: it is removed, as a suspended process may still have it open."""
    number = path.stem.removeprefix("shard-")
    finished = number.isdecimal() and (path.parent / _RECORDS / f"{int(number)}.json").exists()
    return path.suffix == ".tar" and not finished


def finished(folder: Path) -> int:
    """How many shards are recorded as finished."""
    return len(list((folder / _RECORDS).glob("*.json")))


def _kept(folder: Path) -> str:
    if not (count := finished(folder)):
        return "Nothing was kept of it; make room or choose another place, and run the command again."
    return (
        f"{count} finished shard{'s are' if count > 1 else ' is'} kept in {folder}: make room and run the "
        "same command again, which makes the others, or remove that folder."
    )


def record(folder: Path, number: int, written: Written) -> None:
    """Record shard `number` as finished. Raises LockLostError if another process has the folder now."""
    _lock.check()
    durable.write(folder / _RECORDS / f"{number}.json", json.dumps(asdict(written)), make_folder=False)


def recorded(folder: Path, number: int) -> Written | None:
    """The record of a shard, if that is there unchanged."""
    try:
        values = json.loads((folder / _RECORDS / f"{number}.json").read_text())
        labels = {int(label): count for label, count in values["shard"].pop("labels").items()}
        shard = Shard(**values["shard"], labels=labels)
        if shard.nsamples:
            with (folder / shard.url).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                    return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return Written(shard, tuple(Skipped(*item) for item in values["skipped"]), values["facts"])
