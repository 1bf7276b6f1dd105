"""The index of a training's data, brought from where a job is submitted to where it runs.

For data that cannot be written to, or that lie at a URL, an index may be in a cache folder (see
pipeline/data/record.py); a job has another one, on each node's own disk.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import platformdirs

from pipeline.config import Data, UserError
from pipeline.data.locate import locate
from pipeline.data.record import places
from pipeline.data.remote.fetch import RemoteShards
from pipeline.data.remote.urls import is_url, locate_url


def keep(data: Data, folder: Path) -> None:
    """Copy what this machine's cache knows of the data, if it does, into `folder`. Raises UserError."""
    cached = _cached(data)
    if cached is not None and cached.is_dir():
        _copy(cached, folder / cached.name, "Set run.out.")


def bring(data: Data) -> None:
    """Copy what was kept (SHARDGAN_INDEX names the folder), or is in the user's own cache, into the cache
    here. Raises UserError."""
    cached = _cached(data)
    if cached is None:
        return
    kept = os.environ.get("SHARDGAN_INDEX")
    for folder in [*([Path(kept)] if kept else []), Path(platformdirs.user_cache_dir("shardgan")) / "index"]:
        there = folder / cached.name
        if there.is_dir() and there != cached:
            _copy(there, cached, "Set SHARDGAN_CACHE to a folder with space.")


def _cached(data: Data) -> Path | None:
    """Where in the cache of this machine index and sidecars are, or would be; None if there are no data,
    which is for others to say. Of a folder it does not matter whether it shows shards without its index."""
    train = str(data.train)
    try:
        if is_url(train):
            return RemoteShards(locate_url(train)[0], data.remote).home
        folder = Path(train).expanduser().absolute()
        return places(folder if folder.is_dir() else locate(train).root)[1]
    except UserError:
        return None


def _copy(source: Path, target: Path, remedy: str) -> None:
    """What is missing there or older: each file appears whole, as other jobs may do the same. Of an index
    the newest counts, so files keep their times."""
    try:
        for file in sorted(path for path in source.rglob("*") if path.is_file()):
            copy = target / file.relative_to(source)
            if copy.exists() and copy.stat().st_mtime_ns >= file.stat().st_mtime_ns:
                continue
            copy.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=copy.parent) as scratch:
                shutil.copy2(file, Path(scratch) / "file")
                (Path(scratch) / "file").replace(copy)
    except OSError as error:
        raise UserError(
            f"The index in {source} cannot be copied to {target} ({error.strerror}). {remedy}"
        ) from None
