"""What a data folder holds: its shards, their sizes, hashes and labels (`index.json`, sidecars).

`index.json` is wids-compatible and small. Where each sample lies is in one sidecar per shard
(`.shardgan/SHARD.npz`), read only when the stream comes to that shard. What is missing of both is built by
one strict walk over the tars, in a cache folder if the data is read-only.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, Literal, TypeVar

from pipeline.config import Remote, UserError
from pipeline.credentials import redacted
from pipeline.data.locate import Location, locate, refuse_unlisted, warn_of_others
from pipeline.data.record import (
    INDEX,
    REBUILD,
    Shard,
    entry_shard,
    file_size,
    is_complete,
    record_time,
    refuse_other_labels,
    scan_shard,
    shard_of,
    sidecar_list,
    sidecars,
    size_and_time,
    unreadable,
    write_record,
)
from pipeline.data.remote.fetch import RemoteShards, is_verifiable
from pipeline.data.remote.transfer import DeniedError
from pipeline.data.remote.urls import is_url, locate_url
from pipeline.data.samples import MOST_REASONS, REPAIR, PassedOver
from pipeline.data.sidecar import SampleTable
from pipeline.durable import patiently
from pipeline.wording import counted, one_line

Announce = Callable[[str], None]
PassedOverKind = Literal["without_image", "unusable"]
_T = TypeVar("_T")
_R = TypeVar("_R")
_ANNOUNCE_EVERY_S = 10.0
_TOGETHER = 256  # files that a thread looks at in one go
_LOOKED_INTO = 8  # shards that are newer than their index


@dataclass(frozen=True)
class Index:
    """The shards under `root`, sorted by name. Small, immutable and cheap to send to worker processes."""

    name: str
    root: Path  # of remote shards: where their index and sidecars are on this machine
    shards: tuple[Shard, ...]
    class_names: tuple[str, ...] = ()
    remote: RemoteShards | None = None
    license: str | None = None  # of the samples, if index.json has it

    @cached_property
    def num_samples(self) -> int:
        return sum(shard.nsamples for shard in self.shards)

    @cached_property
    def num_classes(self) -> int:
        """0 without labels, else the largest label + 1."""
        return max((max(shard.labels, default=-1) for shard in self.shards), default=-1) + 1

    @property
    def classes(self) -> tuple[str, ...]:
        """One name per class: those that `prepare` recorded, else numbers."""
        named = self.class_names[: self.num_classes]
        return named + tuple(str(label) for label in range(len(named), self.num_classes))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Samples per shard."""
        return tuple(shard.nsamples for shard in self.shards)

    @cached_property
    def fingerprint(self) -> str:
        """Of names, counts and contents: equal for equal data in any place."""
        text = json.dumps([[shard.url, shard.nsamples, shard.sha256] for shard in self.shards])
        return hashlib.sha256(text.encode()).hexdigest()

    def passed_over(self, kind: PassedOverKind) -> PassedOver:
        """The unused samples of all shards, with some reasons if the shards are on this machine."""
        found = [i for i, shard in enumerate(self.shards) if getattr(shard, kind)]
        reasons: list[str] = []
        for i in found if self.remote is None else ():
            if len(reasons) < MOST_REASONS:
                reasons += getattr(self.table(i), kind).reasons
        return PassedOver(sum(getattr(self.shards[i], kind) for i in found), tuple(reasons[:MOST_REASONS]))

    @property
    def where(self) -> str:
        """Where the shards are, for messages."""
        return str(self.remote.folder if self.remote else self.root)

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(self.sizes))

    def place(self, number: int) -> tuple[int, int]:
        """Shard and row of a sample, numbered in the order of shards and rows."""
        shard = bisect_right(self._ends, number)
        return shard, number - self._ends[shard] + self.sizes[shard]

    def path(self, shard: int) -> Path:
        """Of a shard on this machine."""
        return self.root / self.shards[shard].url

    def mend(self, shard: int) -> str:
        """What to do about a shard whose bytes are not those that were indexed."""
        if self.remote:
            return f"Remove {self.remote.cache.path(self.shards[shard])} to fetch it again."
        return (
            f"The file in {self.root} is damaged: fetch it again. If the shards were replaced on purpose, "
            f"{REBUILD}."
        )

    def open(self, shard: int) -> int:
        """A file descriptor of a shard, which is fetched first if it is remote. Raises UserError."""
        if self.remote:
            return self.remote.open(self.shards[shard])
        try:
            return patiently(lambda: os.open(self.path(shard), os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            raise unreadable(self.root, self.shards[shard].url, error) from None

    def fetch_ahead(self, shard: int, keep: Collection[str], stop: threading.Event) -> None:
        """Fetch a remote shard for later, removing none of those in `keep` (SHA-256) for it."""
        if self.remote:
            self.remote.ahead(self.shards[shard], keep, stop)

    def table(self, shard: int) -> SampleTable:
        """Where the samples of a shard lie, from its sidecar. load_index has made sure that there is one."""
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

    def _local_table(self, entry: Shard) -> SampleTable:
        for table in sidecars(self.root, entry.url):
            if (table.sha256, table.filesize) == (entry.sha256, entry.filesize):
                return table
        return scan_shard(self.root, entry.url, entry.filesize, entry.sha256)


def load_index(train: str, announce: Announce = lambda _: None, remote: Remote | None = None) -> Index:
    """The index of `train`: a folder of tar shards, a glob, a brace list ({000000..000099}), or a URL.

    Reads index.json and the sidecars, and, for shards on this machine, builds what is missing and announces
    it. Safe when several processes do it at once. `remote` is how remote shards are kept here. Raises
    UserError, naming the shard and what to do, if there are no shards, one is missing, has another size than
    recorded, or is not a complete tar; for a URL, if there is no index.json that describes all of them.
    """
    if is_url(train):
        return _load_remote(train, announce, remote or Remote())
    return not_empty(local_index(train, announce))


def local_index(train: str, announce: Announce) -> Index:
    """As load_index, for shards on this machine, which may all be empty."""
    location = locate(train)
    refuse_unlisted(location)
    index = index_of(location.root, location.record, _shards(location, announce))
    if location.whole and not location.entries:
        warn_of_others(location, announce)
        write_record(index.root, index.name, index.shards, {})
    return index


def index_of(
    root: Path, record: Mapping[str, Any], shards: Sequence[Shard], remote: RemoteShards | None = None
) -> Index:
    """`record`: index.json, for the names."""
    folder = Path(remote.folder.path) if remote else root
    classes = tuple(one_line(str(name)) for name in record.get("classes", ()))
    terms = one_line(str(record["license"])) if record.get("license") else None
    name = one_line(str(record.get("name") or folder.name))
    return Index(name, root, tuple(shards), classes, remote, terms)


def not_empty(index: Index) -> Index:
    """The index. Raises UserError, with the reason, if no sample in its shards can be used."""
    if index.num_samples:
        return index
    unusable, without = index.passed_over("unusable"), index.passed_over("without_image")
    if not unusable.count + without.count:
        raise UserError(
            f"There are no samples in the shards of {index.where}. Make them with `shardgan prepare`."
        )
    raise UserError(
        f"There are no images in the shards of {index.where} that can be used, of "
        f"{counted(unusable.count + without.count, 'sample')}."
        f"{unusable.first or without.first}{f' {REPAIR}' * (unusable.count > 0)}"
    )


def index_shards(root: Path, missing: Mapping[str, Mapping[str, Any]], announce: Announce) -> Iterator[Shard]:
    """Walk these shards and write their sidecars. `missing`: what index.json says of each by its name."""
    if not missing:
        return
    shards = "shard" if len(missing) == 1 else "shards"
    announce(f"Indexing {len(missing)} {shards} in {root} (once; kept for the next time) …")

    def walk(url: str) -> Shard:
        return shard_of(url, scan_shard(root, url, file_size(root, url), missing[url].get("sha256")))

    announced = time.monotonic()
    for done, shard in enumerate(in_threads(walk, tuple(missing)), start=1):
        yield shard
        if time.monotonic() > announced + _ANNOUNCE_EVERY_S and done < len(missing):
            announced = time.monotonic()
            announce(f"  {done} of {len(missing)} shards indexed")


def in_threads(
    work: Callable[[_T], _R], items: Sequence[_T], at_once: int = min(16, os.cpu_count() or 1)
) -> Iterator[_R]:
    """`work` of every item in order, several at once.

    In threads: most of the time is spent hashing and reading, which release the interpreter, and threads are
    safe to start even if the process has started CUDA or a process group.
    """
    with ThreadPoolExecutor(at_once) as pool:
        yield from pool.map(work, items)


def _load_remote(train: str, announce: Announce, remote: Remote) -> Index:
    folder, names = locate_url(train)
    shards = RemoteShards(folder, remote)
    build = (
        f"`shardgan prepare --index-only '{redacted(train)}'` fetches them once and builds it on this machine"
    )
    try:
        record = shards.record(names, announce)
    except DeniedError as error:
        raise UserError(
            f"{error} Some servers say so too of an {INDEX} that is not there; then {build}."
        ) from None
    entries = {entry["url"]: entry for entry in record.get("shardlist", [])}
    if not entries:
        raise UserError(f"There is no {INDEX} that lists shards in {folder}; {build}.")
    wanted = sorted(entries) if names is None else names
    if lacking := [name for name in wanted if not is_verifiable(entries.get(name, {}))]:
        raise UserError(
            f"The {INDEX} of {folder} does not give count, size, SHA-256 and labels of "
            f"{lacking[0]}{f' and {len(lacking) - 1} other shards' * (len(lacking) > 1)}; {build}."
        )
    found = [entry_shard(entries[name]) for name in wanted]
    return not_empty(index_of(shards.home, record, found, shards))


def _shards(location: Location, announce: Announce) -> list[Shard]:
    """Index entries where they are complete and have a sidecar; a walk over the other shards."""
    found: dict[str, Shard] = {}
    missing: dict[str, Mapping[str, Any]] = {}
    known, has_sidecar = location.entries, sidecar_list(location.root)
    recorded, newer = record_time(location.root), []
    for url, (size, written) in zip(location.urls, _looks(location.root, location.urls), strict=True):
        entry = known.get(url, {})
        if entry and written > recorded:
            newer.append(entry)
        if "filesize" in entry and entry["filesize"] != size:
            raise UserError(
                f"shard {url} in {location.root} has {size} bytes, not the {entry['filesize']} that {INDEX} "
                f"records: it was cut short or changed. Fetch it again, or, if it was changed on purpose, "
                f"{REBUILD}."
            )
        if shard := _indexed(location.root, url, size, entry, has_sidecar(url)):
            found[url] = shard
        else:
            missing[url] = entry
    for entry in newer[:: max(1, len(newer) // _LOOKED_INTO)]:
        refuse_other_labels(location.root, entry)
    found |= {shard.url: shard for shard in index_shards(location.root, missing, announce)}
    return [found[url] for url in location.urls]


def _looks(root: Path, urls: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Of each, in order; several at once, as a network disk is asked. Raises UserError for a missing one."""
    parts = [urls[first : first + _TOGETHER] for first in range(0, len(urls), _TOGETHER)]
    return chain.from_iterable(in_threads(lambda part: [size_and_time(root, url) for url in part], parts))


def _indexed(root: Path, url: str, size: int, entry: Mapping[str, Any], has_sidecar: bool) -> Shard | None:
    """The shard as known from index.json and its sidecar; None if it must be walked."""
    if is_complete(entry) and has_sidecar:
        return entry_shard(entry)
    for table in sidecars(root, url):
        if table.filesize == size and table.sha256 == entry.get("sha256", table.sha256):
            return shard_of(url, table)
    return None
