"""What a data folder holds: its shards, their sizes, hashes and labels (`index.json`, sidecars).

`index.json` is wids-compatible and small; where each sample lies is in one sidecar per shard
(`.shardgan/SHARD.npz`), read only when the stream comes to that shard. Both are built by one strict walk
over the tars when they are missing, in a cache folder when the data cannot be written to.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pipeline.config import Remote, UserError
from pipeline.credentials import redacted
from pipeline.data import sidecar
from pipeline.data.locate import Location, locate, locate_anew
from pipeline.data.record import (
    INDEX,
    REBUILD,
    entry_shard,
    places,
    shard_of,
    sidecar_path,
    write_record,
)
from pipeline.data.record import (
    Shard as Shard,  # the class is part of this module
)
from pipeline.data.remote.fetch import RemoteShards, is_complete
from pipeline.data.remote.urls import is_url, locate_url
from pipeline.data.samples import MOST_REASONS, REPAIR, PassedOver, counted, describe
from pipeline.data.walk import file_size, in_threads, scan_shard

PassedOverKind = Literal["without_image", "unusable"]
_TRANSFERS = 8  # at once, when all shards of a URL are indexed


@dataclass(frozen=True)
class Index:
    """The shards under `root`, sorted by name. Small, immutable and cheap to send to worker processes."""

    name: str
    root: Path  # of shards elsewhere: where their index and sidecars are here
    shards: tuple[Shard, ...]
    class_names: tuple[str, ...] = ()
    remote: RemoteShards | None = None

    @cached_property
    def num_samples(self) -> int:
        return sum(shard.nsamples for shard in self.shards)

    @cached_property
    def num_classes(self) -> int:
        """0 without labels, else the largest label + 1."""
        return max((max(shard.labels, default=-1) for shard in self.shards), default=-1) + 1

    @property
    def classes(self) -> tuple[str, ...]:
        """One name per class: as recorded by `prepare`, else the numbers."""
        named = self.class_names[: self.num_classes]
        return named + tuple(str(label) for label in range(len(named), self.num_classes))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Samples per shard: what a plan is made from."""
        return tuple(shard.nsamples for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """Of names, counts and contents: equal for equal data, wherever it lies."""
        text = json.dumps([[shard.url, shard.nsamples, shard.sha256] for shard in self.shards])
        return hashlib.sha256(text.encode()).hexdigest()

    def passed_over(self, kind: PassedOverKind) -> PassedOver:
        """The samples of all shards that are not used; some reasons if the shards are on this machine."""
        found = [i for i, shard in enumerate(self.shards) if getattr(shard, kind)]
        reasons: list[str] = []
        for i in found if self.remote is None else ():
            if len(reasons) < MOST_REASONS:
                reasons += getattr(self.table(i), kind).reasons
        return PassedOver(sum(getattr(self.shards[i], kind) for i in found), tuple(reasons[:MOST_REASONS]))

    @property
    def where(self) -> str:
        """Where the shards are, for people."""
        return str(self.remote.folder if self.remote else self.root)

    def path(self, shard: int) -> Path:
        """Of a shard on this machine."""
        return self.root / self.shards[shard].url

    def mend(self, shard: int) -> str:
        """What to do about a shard whose bytes are not those that were indexed."""
        if self.remote:
            return f"Remove {self.remote.cache.path(self.shards[shard])}, and it is fetched again."
        return (
            f"The file in {self.root} is damaged: fetch it again. If the shards were replaced on purpose, "
            f"{REBUILD}."
        )

    def open(self, shard: int) -> int:
        """A file descriptor of a shard, fetched first if it is elsewhere. Raises UserError."""
        if self.remote:
            return self.remote.open(self.shards[shard])
        try:
            return os.open(self.path(shard), os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            url = self.shards[shard].url
            raise UserError(f"shard {url} in {self.root} cannot be read: {error.strerror}.") from None

    def fetch_ahead(self, shard: int, keep: Collection[str], stop: threading.Event) -> None:
        """Fetch a shard of elsewhere for later; those of `keep` (SHA-256) do not go for it."""
        if self.remote:
            self.remote.ahead(self.shards[shard], keep, stop)

    def table(self, shard: int) -> sidecar.SampleTable:
        """Where the samples of a shard lie. Read from its sidecar; load_index has seen that there is one."""
        entry = self.shards[shard]
        table = self.remote.table(entry) if self.remote else self._local_table(entry)
        if len(table) != entry.nsamples:
            raise UserError(
                f"shard {entry.url} in {self.where} has {len(table)} samples, {INDEX} says {entry.nsamples}: "
                f"{REBUILD}."
            )
        if table.label_counts() != entry.labels:
            raise UserError(
                f"shard {entry.url} in {self.where} has other labels than {INDEX} says: {REBUILD}."
            )
        return table

    def _local_table(self, entry: Shard) -> sidecar.SampleTable:
        found = (sidecar.load(sidecar_path(place, entry.url)) for place in places(self.root))
        is_its = (entry.sha256, entry.filesize)
        table = next((t for t in found if t is not None and (t.sha256, t.filesize) == is_its), None)
        return table if table is not None else scan_shard(self.root, entry.url, entry.filesize, entry.sha256)


def load_index(
    train: str, announce: Callable[[str], None] = lambda _: None, remote: Remote | None = None
) -> Index:
    """The index of `train`: a folder of tar shards, a glob, a brace list ({000000..000099}), or a URL.

    Reads index.json and the sidecars, and, for shards on this machine, builds what is missing, saying so by
    `announce`. Safe when several processes do it at once. Raises UserError, naming the shard and what to do,
    when there are no shards, one is missing, has another size than recorded, or is not a complete tar; for a
    URL, when there is no index.json that describes all of them. `remote` is how they are then kept here.
    """
    if is_url(train):
        return _load_remote(train, announce, remote or Remote())
    return not_empty(local_index(train, announce))


def local_index(train: str, announce: Callable[[str], None]) -> Index:
    """As load_index, for shards on this machine, which may all be empty."""
    location = locate(train)
    record, entries = location.record, location.entries
    _refuse_unlisted(location)
    shards = _shards(location, entries, announce)
    index = Index(
        name=str(record.get("name") or location.root.name),
        root=location.root,
        shards=shards,
        class_names=tuple(str(name) for name in record.get("classes", ())),
    )
    if location.whole and not entries:
        write_record(index.root, index.name, index.shards, {})
    return index


def build_index(
    train: str,
    announce: Callable[[str], None] = lambda _: None,
    *,
    name: str | None = None,
    extra: Mapping[str, Any] | None = None,
    remote: Remote | None = None,
) -> Index:
    """Walk every shard anew and write index.json and sidecars, whatever was there before.

    `extra` goes into index.json as it is; its `classes` are the class names. Class names of an index.json
    that is being replaced are kept. `train` must be a folder, or a URL, whose shards are all fetched once and
    whose index is kept on this machine. Raises UserError as load_index does.
    """
    if is_url(train):
        return _build_remote(train, announce, remote or Remote())
    location = locate_anew(train, announce)
    before = location.record
    kept = {key: value for key, value in before.items() if key not in ("wids_version", "name", "shardlist")}
    extra = {**kept, **(extra or {})}
    shards = _walk(location, [(url, {}) for url in location.urls], announce)
    index = Index(
        name=name or str(before.get("name") or location.root.name),
        root=location.root,
        shards=shards,
        class_names=tuple(str(text) for text in extra.get("classes", ())),
    )
    write_record(index.root, index.name, not_empty(index).shards, extra)
    for line in describe(index.passed_over("without_image"), index.passed_over("unusable")):
        announce(line)
    return index


def not_empty(index: Index) -> Index:
    """The index. Raises UserError, saying why, if there is no sample in its shards that can be used."""
    if index.num_samples:
        return index
    unusable, without = index.passed_over("unusable"), index.passed_over("without_image")
    if not unusable.count + without.count:
        raise UserError(f"There are no samples in the shards of {index.where}.")
    why = unusable.first or without.first
    raise UserError(
        f"There are no images in the shards of {index.where} that can be used, of "
        f"{counted(unusable.count + without.count)}."
        f"{why}{f' {REPAIR}' * (unusable.count > 0)}"
    )


def _load_remote(train: str, announce: Callable[[str], None], settings: Remote) -> Index:
    folder, names = locate_url(train)
    shards = RemoteShards(folder, settings)
    record = shards.record(announce)
    entries = {entry["url"]: entry for entry in record.get("shardlist", [])}
    build = (
        f"`shardgan prepare --index-only '{redacted(train)}'` fetches them once and builds it on this machine"
    )
    if not entries:
        raise UserError(f"There is no {INDEX} that lists shards in {folder}; {build}.")
    wanted = sorted(entries) if names is None else names
    if lacking := [name for name in wanted if not is_complete(entries.get(name, {}))]:
        raise UserError(
            f"The {INDEX} of {folder} does not give count, size, SHA-256 and labels of "
            f"{lacking[0]}{f' and {len(lacking) - 1} other shards' * (len(lacking) > 1)}; {build}."
        )
    return not_empty(_remote_index(shards, record, tuple(entry_shard(entries[name]) for name in wanted)))


def _build_remote(train: str, announce: Callable[[str], None], settings: Remote) -> Index:
    folder, names = locate_url(train)
    shards = RemoteShards(folder, settings)
    names = names or shards.list(announce)
    if not names:
        raise UserError(
            f"{folder} lists no shards (*.tar). Give a brace list: {folder}{{000000..000099}}.tar"
        )
    announce(f"Fetching and indexing {len(names)} shard{'s' * (len(names) > 1)} of {folder} …")
    found = in_threads(lambda name: shards.index(name, announce), names, announce, at_once=_TRANSFERS)
    index = not_empty(_remote_index(shards, {}, found))
    write_record(index.root, index.name, found, {})
    return index


def _remote_index(shards: RemoteShards, record: Mapping[str, Any], found: tuple[Shard, ...]) -> Index:
    return Index(
        name=str(record.get("name") or Path(shards.folder.path).name),
        root=shards.home,
        shards=found,
        class_names=tuple(str(name) for name in record.get("classes", ())),
        remote=shards,
    )


def _shards(
    location: Location, known: Mapping[str, Mapping[str, Any]], announce: Callable[[str], None]
) -> tuple[Shard, ...]:
    """Index entries where they are complete and have a sidecar; a walk over the other shards."""
    found: dict[str, Shard] = {}
    missing: list[tuple[str, Mapping[str, Any]]] = []
    for url in location.urls:
        entry = known.get(url, {})
        size = file_size(location.root, url)
        if "filesize" in entry and entry["filesize"] != size:
            raise UserError(
                f"shard {url} in {location.root} has {size} bytes, not the {entry['filesize']} that {INDEX} "
                f"records: it was cut short or changed. Fetch it again, or, if it was changed on purpose, "
                f"{REBUILD}."
            )
        shard = _indexed(location.root, url, size, entry)
        if shard is None:
            missing.append((url, entry))
        else:
            found[url] = shard
    found |= {shard.url: shard for shard in _walk(location, missing, announce)}
    return tuple(found[url] for url in location.urls)


def _indexed(root: Path, url: str, size: int, entry: Mapping[str, Any]) -> Shard | None:
    """The shard as known from index.json and its sidecar; None if it must be walked."""
    paths = [sidecar_path(place, url) for place in places(root)]
    if {"nsamples", "filesize", "sha256", "labels"} <= entry.keys() and any(path.exists() for path in paths):
        return entry_shard(entry)
    for path in paths:
        table = sidecar.load(path)
        if table is not None and table.filesize == size and table.sha256 == entry.get("sha256", table.sha256):
            return shard_of(url, table)
    return None


def _walk(
    location: Location, missing: Sequence[tuple[str, Mapping[str, Any]]], announce: Callable[[str], None]
) -> tuple[Shard, ...]:
    if not missing:
        return ()
    shards = "shard" if len(missing) == 1 else "shards"
    announce(f"Indexing {len(missing)} {shards} in {location.root} (once; kept for the next time) …")

    def walk(item: tuple[str, Mapping[str, Any]]) -> Shard:
        url, entry = item
        table = scan_shard(location.root, url, file_size(location.root, url), entry.get("sha256"))
        return shard_of(url, table)

    return in_threads(walk, missing, announce, at_once=min(16, os.cpu_count() or 1))


def _refuse_unlisted(location: Location) -> None:
    """A shard that is missing is said before one too many."""
    for url in location.urls if location.unlisted else ():
        file_size(location.root, url)
    if extra := location.unlisted:
        raise UserError(
            f"{location.root} holds {extra[0]}"
            + (f" and {len(extra) - 1} more shards" if len(extra) > 1 else "")
            + f", which {INDEX} does not list. If it belongs to the data, {REBUILD}; else remove it."
        )
