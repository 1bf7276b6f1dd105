"""Copies the index of the data from the machine a job is submitted on to the nodes that it runs on.

An index is in a cache folder if the data cannot be written to or lie at a URL (see pipeline/data/record.py);
each node has a cache of its own.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import platformdirs

from pipeline import durable
from pipeline.config import Data, UserError
from pipeline.data.locate import locate
from pipeline.data.record import places
from pipeline.data.remote.fetch import RemoteShards
from pipeline.data.remote.urls import is_url, locate_url
from pipeline.errors import expanded


def keep(data: Data, folder: Path) -> None:
    """Copy the index of the data from this machine's cache, if it is there, to `folder`. Raises UserError."""
    cached = _cached(data)
    if cached is not None and cached.is_dir():
        _copy(cached, folder / cached.name, "Set run.out.")


def bring(data: Data) -> None:
    """Copy what was kept (in the folder SHARDGAN_INDEX), or is in the user's own cache, to the cache here.
    Raises UserError."""
    cached = _cached(data)
    if cached is None:
        return
    kept = os.environ.get("SHARDGAN_INDEX")
    for folder in [*([Path(kept)] if kept else []), Path(platformdirs.user_cache_dir("shardgan")) / "index"]:
        there = folder / cached.name
        if there.is_dir() and there != cached:
            _copy(there, cached, "Set SHARDGAN_CACHE to a folder with space.")


def _cached(data: Data) -> Path | None:
    """Where in this machine's cache index and sidecars are, or would be; None if there are no data, which
    others report."""
    train = str(data.train)
    try:
        if is_url(train):
            return RemoteShards(locate_url(train)[0], data.remote).home
        folder = expanded(train).absolute()
        return places(folder if folder.is_dir() else locate(train).root)[1]
    except UserError:
        return None


def _copy(source: Path, target: Path, remedy: str) -> None:
    """Copy files that are missing or older there. They keep their times, as the newest index counts; other
    jobs may do the same at once, and others write here: what begins with a dot is not whole yet."""
    try:
        for file in sorted(p for p in source.rglob("*") if p.is_file() and p.name[0] != "."):
            copy = target / file.relative_to(source)
            if copy.exists() and copy.stat().st_mtime_ns >= file.stat().st_mtime_ns:
                continue
            with durable.whole(copy) as partial:
                shutil.copy2(file, partial)
    except OSError as error:
        raise UserError(
            f"The index in {source} cannot be copied to {target} ({error.strerror}). {remedy}"
        ) from None
