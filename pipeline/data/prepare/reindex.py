"""`shardgan prepare --index-only`: an index built from the shards, whatever was there before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from pipeline.config import Remote, UserError
from pipeline.data.index import Announce, Index, in_threads, index_of, index_shards, not_empty
from pipeline.data.locate import Location, is_file, look, refuse_none, warn_of_others
from pipeline.data.record import WHOLE, entry_shard, is_complete, read_record, write_record
from pipeline.data.remote.fetch import RemoteShards
from pipeline.data.remote.transfer import DeniedError
from pipeline.data.remote.urls import is_url, locate_url
from pipeline.data.samples import describe
from pipeline.lock import turn

_TRANSFERS = 8  # at once


def build_index(train: str, announce: Announce = lambda _: None, remote: Remote | None = None) -> Index:
    """Walk every shard and write index.json and sidecars.

    What an index.json there says of the whole (name, classes, licence) is kept. `train` must be a folder, or
    a URL, whose shards are all fetched once and whose index is kept on this machine. Raises UserError as
    load_index does.
    """
    if is_url(train):
        return _build_remote(train, announce, remote or Remote())
    location = _locate(train, announce)
    shards = tuple(index_shards(location.root, {url: {} for url in location.urls}, announce))
    index = not_empty(index_of(location.root, location.record, shards))
    write_record(index.root, index.name, shards, _of_the_whole(location.record))
    for line in describe(index.passed_over("without_image"), index.passed_over("unusable")):
        announce(line)
    return index


def _build_remote(train: str, announce: Announce, remote: Remote) -> Index:
    """Those of a brace list join the others in an index that was made here before."""
    folder, listed = locate_url(train)
    shards = RemoteShards(folder, remote)
    braces = f"a brace list: {folder}{{000000..000099}}.tar"
    try:
        names = listed or shards.list(announce)
    except DeniedError as error:
        raise UserError(f"{error} Or, if only listing is not allowed, give {braces}") from None
    if not names:
        raise UserError(f"{folder} lists no shards (*.tar). Give {braces}")
    announce(f"Fetching and indexing {len(names)} shard{'s' * (len(names) > 1)} of {folder} …")
    found = tuple(in_threads(lambda name: shards.index(name, announce), names, _TRANSFERS))
    published = _published(shards, announce)
    index = not_empty(index_of(shards.home, published, found, shards))
    with turn(shards.home.with_name(f".{shards.home.name}"), announce):  # others may add theirs
        before = {} if listed is None else read_record(shards.home)
        others = {e["url"]: entry_shard(e) for e in before.get("shardlist", ()) if is_complete(e)}
        every = others | {shard.url: shard for shard in found}
        whole = listed is None or (bool(before) and before.get(WHOLE, True))
        extra = {} if whole else {WHOLE: False}
        every_shard = [every[name] for name in sorted(every)]
        write_record(index.root, index.name, every_shard, _of_the_whole(published) | extra)
    return index


def _published(shards: RemoteShards, announce: Announce) -> dict[str, Any]:
    try:
        return shards.published(announce)
    except UserError as error:  # unfit, or the server refuses what it does not have
        announce(f"{error} A new one is made here.")
        return {}


def _of_the_whole(record: Mapping[str, Any]) -> dict[str, Any]:
    """What an index.json says of the whole, apart from the name, in whatever shards it lies."""
    ours = ("wids_version", "name", "shardlist", WHOLE)
    return {key: value for key, value in record.items() if key not in ours}


def _locate(train: str, announce: Announce) -> Location:
    """All shards of a folder: those in it, and those in folders below that its index.json, if fit, lists.

    Raises UserError if there are none, or `train` is no folder.
    """
    found = look(train)
    if not found.whole:
        raise UserError(f"An index describes a whole folder of shards; {train} is not a folder.")
    try:
        found = replace(found, record=read_record(found.root))
    except UserError as error:
        announce(f"{error} A new one is written.")
    listed = (PurePosixPath(url).as_posix() for url in found.entries)
    urls = {*found.urls, *(url for url in listed if is_file(found.root / url))}
    found = replace(found, urls=tuple(sorted(urls)))
    refuse_none(found)
    warn_of_others(found, announce)
    return found
