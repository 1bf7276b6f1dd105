"""`data.train` on this machine → a folder and shards in it: a folder, a glob, a brace list, or one tar."""

from __future__ import annotations

import glob
import os
import re
import shlex
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from braceexpand import braceexpand  # comes with webdataset, which reads brace lists by it

from pipeline.config import UserError, expanded, readable
from pipeline.data.record import INDEX, REBUILD, file_size, read_record
from pipeline.wording import did_you_mean

_MOST_SHARDS = 1_000_000
_SUFFIX = ".tar"  # .TAR likewise, except beside an index.json that does not list it
_COMPRESSED = re.compile(r"\.(tar\.(gz|bz2|xz|zst|lz4?|z|br|lzma)|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)
_LOOKED_INTO = 100  # folders, in search of shards that nobody named
_LOOKED_AT = 1_000  # files of each
_MAKE = "`shardgan prepare SOURCE OUT` makes such a folder from images."
FETCHED = ("cifar10", "fashion-mnist")  # known to pipeline.data.prepare


@dataclass(frozen=True)
class Location:
    """Shards `urls`, sorted, relative to `root`; `whole` if they must be all that the folder holds.

    `record` is index.json, {} without one; `unlisted` are shards in a whole folder that it does not list.
    """

    root: Path
    urls: tuple[str, ...]
    whole: bool
    record: Mapping[str, Any] = field(default_factory=dict, repr=False)
    unlisted: tuple[str, ...] = ()

    @property
    def entries(self) -> dict[str, Mapping[str, Any]]:
        """What index.json says of each shard."""
        return {entry["url"]: entry for entry in self.record.get("shardlist", ())}


def locate(train: str) -> Location:
    """Find shards on this machine: of a whole folder those that its index.json lists, if it lists any, also
    in folders below. Raises UserError if there are none or index.json is unfit."""
    found = look(train)
    found = replace(found, record=read_record(found.root))
    if not found.whole:
        return found
    entries = found.entries
    if not entries:
        refuse_none(found)
        return found
    known = {PurePosixPath(url).as_posix() for url in entries}
    unlisted = tuple(url for url in found.urls if url not in known and url.endswith(_SUFFIX))
    return replace(found, urls=tuple(sorted(entries)), unlisted=unlisted)


def expand_braces(pattern: str) -> list[str]:
    """The names that a brace list stands for; the pattern itself if it is none."""
    try:
        names = list(islice(braceexpand(pattern), _MOST_SHARDS + 1))
    except ValueError:
        raise UserError(
            f"{pattern} is not a brace list, such as {{000000..000099}}.tar: a brace is not closed."
        ) from None
    if len(names) > _MOST_SHARDS:
        raise UserError(f"{pattern} stands for more than {_MOST_SHARDS} shards. Is a number too long?")
    return names


def look(train: str) -> Location:
    """What there is, without a look into index.json. Raises UserError if there is nothing, or one may not
    look."""
    with readable(train):
        return _look(train)


def _look(train: str) -> Location:
    if train.startswith("pipe:"):
        raise UserError(f"{train} is a command, not a place; shards are never read by running one.")
    root = expanded(train).absolute()
    root = root.parent if root.name == INDEX else root
    if root.is_dir():
        with os.scandir(root) as entries:  # which know what is a file without a look at each
            return Location(root, tuple(sorted(e.name for e in entries if _is_shard(e))), whole=True)
    paths = _expand(train)
    if not paths:
        near = did_you_mean(root)
        seen = "" if Path(train).is_absolute() else f", seen from {Path.cwd()}"
        raise UserError(
            f"There are no shards at {train}{seen}: no such folder, and no file it stands for.{near} "
            + _how(train)
        )
    folders = {str(path.parent) for path in paths}
    root = Path(os.path.commonpath(sorted(folders)))
    return Location(root, tuple(sorted({path.relative_to(root).as_posix() for path in paths})), whole=False)


def refuse_unlisted(location: Location) -> None:
    """Raises UserError for a missing shard, then for one too many."""
    for url in location.urls if location.unlisted else ():
        file_size(location.root, url)
    if extra := location.unlisted:
        raise UserError(
            f"{location.root} holds {extra[0]}"
            + (f" and {len(extra) - 1} more shards" if len(extra) > 1 else "")
            + f", which {INDEX} does not list. If it belongs to the data, {REBUILD}; else remove it."
        )


def refuse_none(found: Location) -> None:
    """Raises UserError if a folder holds no shards, or a broken link instead of one."""
    for path in sorted(found.root.iterdir()):
        if path.name.lower().endswith(_SUFFIX) and path.is_symlink() and not path.exists():
            raise UserError(
                f"shard {path} is a link to {path.readlink()}, which is not there. Remove it or mend it."
            )
    if found.urls:
        return
    if names := packed(found):
        raise UserError(
            f"There are no shards (*.tar) in {found.root}, but {names[0]}: shards are not compressed. "
            "Unpack it to a .tar (gunzip, unxz or the like)."
        )
    if names := deeper(found):
        raise UserError(
            f"There are no shards (*.tar) in {found.root} itself, but in {_and_more(names)}: name that "
            f"folder, or, for those of several, '{found.root}/*/*{_SUFFIX}'."
        )
    raise UserError(f"There are no shards (*.tar) in {found.root}. {_MAKE}")


def _how(train: str) -> str:
    """To make what is not there."""
    known = Path(train).name in FETCHED
    return f"Fetch it: `shardgan prepare {Path(train).name} {shlex.quote(train)}`." if known else _MAKE


def packed(found: Location) -> list[str]:
    """The names of compressed tars in the folder that are not there unpacked too."""
    names = [path.name for path in sorted(found.root.iterdir())]
    return [n for n in names if _COMPRESSED.search(n) and _COMPRESSED.sub(_SUFFIX, n) not in names]


def deeper(found: Location) -> list[str]:
    """The names of folders in the folder that hold shards, of which index.json lists none."""
    listed = {PurePosixPath(url).parts[0] for url in found.entries}
    with os.scandir(found.root) as entries:
        names = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    return [name for name in names[:_LOOKED_INTO] if name not in listed and _holds_shards(found.root / name)]


def warn_of_others(found: Location, announce: Callable[[str], None]) -> None:
    """Of what may have been meant to be read beside the shards of a whole folder."""
    if not (found.urls and found.whole):
        return
    if names := packed(found):
        announce(
            f"warning: {_and_more(names)} in {found.root} left out: shards are not compressed. What belongs "
            "to the data has to be unpacked to .tar (gunzip, unxz or the like)"
        )
    if names := deeper(found):
        announce(
            f"warning: the shards of {_and_more(names)} in {found.root} left out: a folder stands for the "
            f"shards in it. All together are '{found.root}/**/*{_SUFFIX}'"
        )


def _and_more(names: list[str]) -> str:
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]


def _holds_shards(folder: Path) -> bool:
    """Among its first files: a folder of images may have a million."""
    try:
        with os.scandir(folder) as entries:
            return any(_is_shard(entry) for entry in islice(entries, _LOOKED_AT))
    except OSError:
        return False


def is_file(path: Path) -> bool:
    with suppress(OSError):
        return path.is_file()
    return False


def _is_shard(path: Path | os.DirEntry[str]) -> bool:
    return path.name.lower().endswith(_SUFFIX) and not path.name.startswith(".") and path.is_file()


def _expand(pattern: str) -> list[Path]:
    """A brace list names files that must exist; a glob matches those that do."""
    names = expand_braces(pattern)
    paths: list[Path] = []
    for name in names:
        path = expanded(name).absolute()
        if path.is_file():
            paths.append(path)
        elif glob.has_magic(name):
            anchor = Path(path.anchor)
            paths += [found for found in anchor.glob(str(path.relative_to(anchor))) if _is_shard(found)]
        elif len(names) > 1:
            raise UserError(
                f"shard {name} is missing, although {pattern} lists it. Fetch it, or correct the list."
            )
    return paths
