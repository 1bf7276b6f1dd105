"""What a data folder holds: its shards, their sizes, hashes and labels (`index.json`, sidecars).

`index.json` is wids-compatible and small; where each sample lies is in one sidecar per shard
(`.shardgan/SHARD.npz`), read only when the stream comes to that shard. Both are built by one strict walk
over the tars when they are missing, in a cache folder when the data cannot be written to.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import UserError
from pipeline.data import sidecar
from pipeline.data.locate import Location, locate
from pipeline.data.record import (
    INDEX,
    REBUILD,
    places,
    read_record,
    shard_of,
    sidecar_path,
    write_record,
    write_somewhere,
)
from pipeline.data.record import (
    Shard as Shard,  # the class is part of this module
)

_TELL_EVERY_S = 10.0


@dataclass(frozen=True)
class Index:
    """The shards under `root`, sorted by name. Small, immutable and cheap to send to worker processes."""

    name: str
    root: Path
    shards: tuple[Shard, ...]
    class_names: tuple[str, ...] = ()

    @property
    def num_samples(self) -> int:
        return sum(shard.nsamples for shard in self.shards)

    @property
    def num_classes(self) -> int:
        """0 without labels, else the largest label + 1."""
        return max((max(shard.labels, default=-1) for shard in self.shards), default=-1) + 1

    @property
    def classes(self) -> tuple[str, ...]:
        """One name per class: as recorded by `prepare`, else the numbers."""
        named = self.class_names[: self.num_classes]
        return named + tuple(str(label) for label in range(len(named), self.num_classes))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Samples per shard: what a plan is made from."""
        return tuple(shard.nsamples for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """Of names, counts and contents: equal for equal data, wherever it lies."""
        text = json.dumps([[shard.url, shard.nsamples, shard.sha256] for shard in self.shards])
        return hashlib.sha256(text.encode()).hexdigest()

    def path(self, shard: int) -> Path:
        return self.root / self.shards[shard].url

    def table(self, shard: int) -> sidecar.Table:
        """Where the samples of a shard lie. Read from its sidecar; load_index has seen that there is one."""
        entry = self.shards[shard]
        found = (sidecar.load(sidecar_path(place, entry.url)) for place in places(self.root))
        table = next((t for t in found if t is not None and t.sha256 == entry.sha256), None)
        if table is None:
            table = scan_shard(self.root, entry.url, entry.filesize, entry.sha256)
        if len(table) != entry.nsamples:
            raise UserError(
                f"shard {entry.url} in {self.root} has {len(table)} samples, {INDEX} says {entry.nsamples}: "
                f"{REBUILD}."
            )
        return table


def load_index(train: str, announce: Callable[[str], None] = lambda _: None) -> Index:
    """The index of `train`: a folder of tar shards, a glob, or a brace list ({000000..000099}).

    Reads index.json and the sidecars, and builds what is missing, saying so by `announce`. Safe when several
    processes do it at once. Raises UserError, naming the shard and what to do, when there are no shards, one
    is missing, has another size than recorded, or is not a complete tar.
    """
    location = locate(train)
    record = read_record(location.root)
    entries = record.get("shardlist", [])
    if entries and location.whole:
        _compare_names(location, [entry["url"] for entry in entries])
    known = {entry["url"]: entry for entry in entries}
    shards = _shards(location, known, announce)
    index = Index(
        name=str(record.get("name") or location.root.name),
        root=location.root,
        shards=shards,
        class_names=tuple(str(name) for name in record.get("classes", ())),
    )
    if location.whole and not entries:
        write_record(index.root, index.name, index.shards, {})
    return _not_empty(index)


def build_index(
    train: str,
    announce: Callable[[str], None] = lambda _: None,
    *,
    name: str | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Index:
    """Walk every shard anew and write index.json and sidecars, whatever was there before.

    `extra` goes into index.json as it is; its `classes` are the class names. Class names of an index.json
    that is being replaced are kept. `train` must be a folder. Raises UserError as load_index does.
    """
    location = locate(train)
    if not location.whole:
        raise UserError(f"An index describes a whole folder of shards; {train} is not a folder.")
    before = read_record(location.root)
    kept = {key: value for key, value in before.items() if key not in ("wids_version", "name", "shardlist")}
    extra = {**kept, **(extra or {})}
    shards = _walk(location, [(url, {}) for url in location.urls], announce)
    index = Index(
        name=name or str(before.get("name") or location.root.name),
        root=location.root,
        shards=shards,
        class_names=tuple(str(text) for text in extra.get("classes", ())),
    )
    write_record(index.root, index.name, _not_empty(index).shards, extra)
    return index


def _not_empty(index: Index) -> Index:
    if not index.num_samples:
        raise UserError(f"There are no samples in the shards of {index.root}.")
    return index


def _shards(
    location: Location, known: Mapping[str, Mapping[str, Any]], announce: Callable[[str], None]
) -> tuple[Shard, ...]:
    """Index entries where they are complete and have a sidecar; a walk over the other shards."""
    found: dict[str, Shard] = {}
    missing: list[tuple[str, Mapping[str, Any]]] = []
    for url in location.urls:
        entry = known.get(url, {})
        size = _file_size(location.root, url)
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
    sidecars = [path for place in places(root) if (path := sidecar_path(place, url)).exists()]
    if sidecars and {"nsamples", "filesize", "sha256", "labels"} <= entry.keys():
        labels = {int(label): int(count) for label, count in entry["labels"].items()}
        return Shard(url, entry["nsamples"], entry["filesize"], entry["sha256"], labels)
    for path in sidecars:
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
        table = scan_shard(location.root, url, _file_size(location.root, url), entry.get("sha256"))
        return shard_of(url, table)

    # Threads: hashing and reading, where the time goes for all but tiny images, let go of the interpreter,
    # and threads are safe to start whatever else (CUDA, a process group) the process has begun.
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
        futures = [pool.submit(walk, item) for item in missing]
        try:
            _tell_progress(futures, announce)
            return tuple(future.result() for future in futures)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _tell_progress(futures: Sequence[Future[Shard]], announce: Callable[[str], None]) -> None:
    """A line now and then while it lasts, and an early end when one fails."""
    pending: set[Future[Shard]] = set(futures)
    while pending:
        done, pending = wait(pending, _TELL_EVERY_S, return_when=FIRST_EXCEPTION)
        if any(future.exception() for future in done):
            return
        if pending:
            announce(f"  {len(futures) - len(pending)} of {len(futures)} shards indexed")


def scan_shard(root: Path, url: str, filesize: int, sha256: str | None) -> sidecar.Table:
    """Walk one shard and write its sidecar. Raises UserError if it is not whole, or not the one expected."""
    try:
        table = sidecar.scan(root / url, url)
    except OSError as error:
        raise UserError(f"shard {url} in {root} cannot be read: {error.strerror or error}.") from None
    sidecar.check(table, url, filesize, sha256)
    write_somewhere(root, lambda place: sidecar.save(table, sidecar_path(place, url)))
    return table


def _file_size(root: Path, url: str) -> int:
    try:
        return (root / url).stat().st_size
    except FileNotFoundError:
        raise UserError(
            f"shard {url} is missing from {root}, although {INDEX} lists it. Fetch it again, or, if it was "
            f"removed on purpose, {REBUILD}."
        ) from None
    except OSError as error:
        raise UserError(f"shard {url} in {root} cannot be read: {error.strerror or error}.") from None


def _compare_names(location: Location, listed: list[str]) -> None:
    for url in sorted(set(listed) - set(location.urls)):
        _file_size(location.root, url)  # says that it is missing
    if extra := sorted(set(location.urls) - set(listed)):
        raise UserError(
            f"{location.root} holds {extra[0]}"
            + (f" and {len(extra) - 1} more shards" if len(extra) > 1 else "")
            + f", which {INDEX} does not list. If it belongs to the data, {REBUILD}; else remove it."
        )
