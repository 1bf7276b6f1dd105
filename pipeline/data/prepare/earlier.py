"""Whether a folder of shards was made by the same command before, of the same files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config import UserError, expanded
from pipeline.credentials import redacted
from pipeline.data.record import INDEX, read_record
from pipeline.wording import counted


class ChangedSourceError(UserError):
    """The files of a source are not those that shards were made of. `how`: in which way."""

    def __init__(self, target: Path, how: str) -> None:
        super().__init__(
            f"{target} is there already, but {how} when it was made. Remove that folder, or give the name of "
            "a new one."
        )
        self.how = how


class TakenError(UserError):
    """A folder is there, of other images or made in another way."""

    def __init__(self, target: Path) -> None:
        super().__init__(f"{target} is there already. Give the name of a new folder, or remove that one.")


Recipe = dict[str, Any]  # where the images come from, and how they are written


def where_from(source: str) -> dict[str, str]:
    """Where images come from: the name, and a digest of the path, which published data should not show."""
    path = redacted(source) if "://" in source else os.path.realpath(expanded(source))
    return {"source": Path(path).name, "path": hashlib.sha256(os.fsencode(path)).hexdigest()[:16]}


def files_of(count: int, fingerprint: str) -> dict[str, Any]:
    """Recorded to see later whether the files of a source are the same."""
    return {"images": count, "fingerprint": fingerprint}


def made_before(target: Path, recipe: Recipe, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """index.json of `target`, if it was made by the same recipe, though perhaps of moved files; {} if
    there is no target. Raises UserError if it holds something else."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return {}
    if target.is_dir() and (target / INDEX).exists():
        record = read_record(target)
        before = record.get("prepared")
        if isinstance(before, dict) and dict(defaults) | _older(before, recipe) | before == recipe:
            return record
        if isinstance(before, dict) and "path" in before and "path" in recipe and _files(record):
            moved = {"source": recipe["source"], "path": recipe["path"]}
            if dict(defaults) | before | moved == recipe:
                return record
    raise TakenError(target)


def _older(before: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """What earlier versions did not record."""
    return {"path": recipe["path"]} if "path" in recipe and "path" not in before else {}


def _files(record: Mapping[str, Any]) -> dict[str, Any]:
    found = record.get("source")
    return found if isinstance(found, dict) and type(found.get("images")) is int else {}


def is_same_place(before: Mapping[str, Any], recipe: Recipe) -> bool:
    """Whether the images came from the same place."""
    return bool(before["prepared"].get("path", recipe.get("path")) == recipe.get("path"))


def refuse_changed(
    target: Path, source: str, before: Mapping[str, Any], recipe: Recipe, count: int, fingerprint: str
) -> None:
    """Raises ChangedSourceError if the files of the source are not those that `target` was made of."""
    files = _files(before)
    if not files or files.get("fingerprint") == fingerprint:
        return
    if not is_same_place(before, recipe):
        raise TakenError(target)
    if more := count - files["images"]:
        changed = f"{source} has {counted(abs(more), 'image')} {'more' if more > 0 else 'fewer'} than"
    else:
        changed = f"the images of {source} have other names, sizes, times or labels than"
    raise ChangedSourceError(target, changed)
