"""`data.train` on this machine → a folder and shards in it: a folder, a glob, a brace list, or one tar."""

from __future__ import annotations

import glob
import os
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import platformdirs
from braceexpand import braceexpand  # comes with webdataset, which reads brace lists by it

from pipeline.config import UserError

_MOST_SHARDS = 1_000_000
_MAKE = "`shardgan prepare SOURCE OUT` makes such a folder from images."


@dataclass(frozen=True)
class Location:
    """Shards `urls`, sorted, relative to `root`; `whole` if they are all that the folder holds."""

    root: Path
    urls: tuple[str, ...]
    whole: bool


def locate(train: str) -> Location:
    """Find the shards on this machine (urls.py: elsewhere). Raises UserError if there are none, and says
    what was looked for."""
    if train.startswith("pipe:"):
        raise UserError(f"{train} is a command, not a place; shards are never read by running one.")
    root = Path(train).expanduser().absolute()
    if root.is_dir():
        urls = tuple(sorted(entry.name for entry in root.iterdir() if _is_shard(entry)))
        if not urls:
            raise UserError(f"There are no shards (*.tar) in {root}. {_MAKE}")
        return Location(root, urls, whole=True)
    paths = _expand(train)
    if not paths:
        raise UserError(f"There are no shards at {train}: no such folder, and no file it stands for. {_MAKE}")
    folders = {str(path.parent) for path in paths}
    root = Path(os.path.commonpath(sorted(folders)))
    return Location(root, tuple(sorted({path.relative_to(root).as_posix() for path in paths})), whole=False)


def cache_folder() -> Path:
    """Where what can be fetched or built again is kept: SHARDGAN_CACHE, else the user's cache folder."""
    return Path(os.environ.get("SHARDGAN_CACHE") or platformdirs.user_cache_dir("shardgan")).absolute()


def expand_braces(pattern: str) -> list[str]:
    """What a brace list stands for; the pattern itself if it is none."""
    try:
        names = list(islice(braceexpand(pattern), _MOST_SHARDS + 1))
    except ValueError:
        raise UserError(f"{pattern} is not a brace list: a brace is not closed.") from None
    if len(names) > _MOST_SHARDS:
        raise UserError(f"{pattern} stands for more than {_MOST_SHARDS} shards.")
    return names


def _is_shard(path: Path) -> bool:
    return path.name.endswith(".tar") and not path.name.startswith(".") and path.is_file()


def _expand(pattern: str) -> list[Path]:
    """A brace list names files that must be there; a glob stands for those that are."""
    names = expand_braces(pattern)
    paths: list[Path] = []
    for name in names:
        path = Path(name).expanduser().absolute()
        if path.is_file():
            paths.append(path)
        elif glob.has_magic(name):
            anchor = Path(path.anchor)
            paths += [found for found in anchor.glob(str(path.relative_to(anchor))) if _is_shard(found)]
        elif len(names) > 1:
            raise UserError(f"shard {name} is missing, although {pattern} lists it.")
    return paths
