"""index.json and the sidecars as files: where they lie, how they are read and written."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline import durable
from pipeline.config import UserError
from pipeline.data import sidecar
from pipeline.data.samples import LARGEST_LABEL
from pipeline.data.sidecar import SampleTable
from pipeline.data.tar import MOST_HEADERS
from pipeline.folders import cache_folder

INDEX = "index.json"
WHOLE = "whole"  # in an index.json made here of remote shards: false if of some that were listed
REBUILD = "run `shardgan prepare --index-only` on the folder"
_SIDECARS = ".shardgan"
_LARGEST_FILE = 2**63 - 1
_UNFIT = {"Cc", "Cf", "Zl", "Zp"}  # kinds of letters that steer a terminal, or break a line of text
_PASSED_OVER = ("without_image", "unusable")  # in index.json only if there are any


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar. `url` is its name relative to the index's root; `labels` counts samples per class.

    `without_image` and `unusable` count samples that are passed over and not among the `nsamples`.
    """

    url: str
    nsamples: int
    filesize: int
    sha256: str
    labels: Mapping[int, int] = field(hash=False)
    without_image: int = 0
    unusable: int = 0


def shard_of(url: str, table: SampleTable) -> Shard:
    passed = {kind: getattr(table, kind).count for kind in _PASSED_OVER}
    return Shard(url, len(table), table.filesize, table.sha256, table.label_counts(), **passed)


def entry_shard(entry: Mapping[str, Any]) -> Shard:
    """A shard from a complete entry of index.json."""
    labels = {int(label): int(count) for label, count in entry["labels"].items()}
    passed = {kind: entry.get(kind, 0) for kind in _PASSED_OVER}
    return Shard(entry["url"], entry["nsamples"], entry["filesize"], entry["sha256"], labels, **passed)


def is_complete(entry: Mapping[str, Any]) -> bool:
    """Whether an entry of index.json says all that is recorded of a shard."""
    return {"nsamples", "filesize", "sha256", "labels"} <= entry.keys()


def places(root: Path) -> tuple[Path, Path]:
    """Where an index and its sidecars may be: with the data, or, if that is read-only, in our cache."""
    return root, cache_folder() / "index" / hashlib.sha256(os.fsencode(root)).hexdigest()[:24]


def sidecar_path(place: Path, url: str) -> Path:
    """Raises UserError if it would be outside the place."""
    if not is_name(url):
        raise UserError(f"{url!r} cannot be the name of a shard inside a folder. Rename it.")
    return place / _SIDECARS / f"{url}.npz"


def sidecar_list(root: Path) -> Callable[[str], bool]:
    """Whether a shard has a sidecar, perhaps of another file of its name. Each folder is listed once."""
    both = places(root)

    @cache
    def names(folder: Path) -> frozenset[str]:
        with suppress(PermissionError):  # the cache of another user: as if it were empty
            return frozenset(path.name for path in folder.iterdir()) if folder.is_dir() else frozenset()
        return frozenset()

    def has_sidecar(url: str) -> bool:
        paths = (sidecar_path(place, url) for place in both)
        return any(path.name in names(path.parent) for path in paths)

    return has_sidecar


def sidecars(root: Path, url: str) -> Iterator[SampleTable]:
    """Those there are of a shard, and readable; perhaps of another file of that name."""
    found = (sidecar.load(sidecar_path(place, url)) for place in places(root))
    return (table for table in found if table is not None)


def scan_shard(root: Path, url: str, filesize: int, sha256: str | None) -> SampleTable:
    """Walk one shard and write its sidecar. Raises UserError if it is not whole, or not the one expected."""
    try:
        table = sidecar.scan(root / url, url)
    except OSError as error:
        raise unreadable(root, url, error) from None
    sidecar.check(table, url, filesize, sha256)

    def write(place: Path) -> None:
        path = sidecar_path(place, url)
        sidecar.save(table, path)
        for made in (path, *path.parents):
            if made == place:
                break
            _let_read(made, place / url)

    _write_somewhere(root, write)
    return table


def refuse_other_labels(root: Path, entry: Mapping[str, Any]) -> None:
    """Raises UserError if the first samples of a shard have other labels than its sidecar says. A shard that
    was written again with others may have the same size, as a tar is padded."""
    url = entry["url"]
    table = next((found for found in sidecars(root, url) if found.sha256 == entry.get("sha256")), None)
    if table is not None and sidecar.has_other_labels(root / url, url, table):
        raise UserError(f"shard {url} in {root} has other labels than {INDEX} says: {REBUILD}.")


def file_size(root: Path, url: str) -> int:
    """Raises UserError if the shard is missing."""
    return size_and_time(root, url)[0]


def size_and_time(root: Path, url: str) -> tuple[int, int]:
    """Bytes, and when it was last written, in ns. Raises UserError if the shard is missing."""
    try:
        found = (root / url).stat()
        return found.st_size, found.st_mtime_ns
    except FileNotFoundError:
        raise UserError(
            f"shard {url} is missing from {root}, although {INDEX} lists it. Fetch it again, or, if it was "
            f"removed on purpose, {REBUILD}."
        ) from None
    except OSError as error:
        raise unreadable(root, url, error) from None


def unreadable(root: Path, url: str, error: OSError) -> UserError:
    return UserError(f"shard {url} in {root} cannot be read: {error.strerror or error}.")


def _write_somewhere(root: Path, write: Callable[[Path], None]) -> None:
    beside, cache = places(root)
    try:
        write(beside)
    except OSError as first:
        try:
            write(cache)
        except OSError as second:
            raise UserError(
                f"The index of {root} can be written neither there ({first.strerror}) nor in {cache} "
                f"({second.strerror}). Set SHARDGAN_CACHE to a folder with space."
            ) from None


def write_record(root: Path, name: str, shards: Sequence[Shard], extra: Mapping[str, Any]) -> None:
    """Write index.json; `extra` goes into it as it is."""
    record = {"wids_version": 1, "name": name, **extra, "shardlist": [_entry(shard) for shard in shards]}
    text = json.dumps(record, indent=1) + "\n"

    def write(place: Path) -> None:
        with durable.whole(place / INDEX) as partial:
            partial.write_bytes(text.encode())
            for shard in shards[:1]:
                _let_read(partial, place / shard.url)

    _write_somewhere(root, write)


def _let_read(path: Path, shard: Path) -> None:
    """Let those read a file or folder who may read the shard it is beside, whatever our umask."""
    with suppress(OSError):  # no shard in our cache; a folder of someone else's; a disk without modes
        readers = stat.S_IMODE(shard.stat().st_mode) & 0o444
        mode = stat.S_IMODE(path.stat().st_mode)
        path.chmod(mode | readers | (readers >> 2 if path.is_dir() else 0))


def _entry(shard: Shard) -> dict[str, Any]:
    labels = {str(label): count for label, count in sorted(shard.labels.items())}
    return {
        "url": shard.url,
        "nsamples": shard.nsamples,
        "filesize": shard.filesize,
        "sha256": shard.sha256,
        "labels": labels,
        **{kind: count for kind in _PASSED_OVER if (count := getattr(shard, kind))},
    }


def record_time(root: Path) -> int:
    """When index.json was written, in ns; 0 if there is none."""
    path = _newest_record(root)
    return path.stat().st_mtime_ns if path else 0


def _newest_record(root: Path) -> Path | None:
    """The newer one of two: read-only data may have been indexed again in our cache."""
    paths = []
    for place in places(root):
        with suppress(PermissionError):  # the cache of another user: as if it were empty
            if (path := place / INDEX).exists():
                paths.append(path)
    return max(paths, key=lambda path: path.stat().st_mtime_ns, default=None)


def read_record(root: Path) -> dict[str, Any]:
    """index.json with its shard list checked; {} if there is none. Raises UserError if it is unfit."""
    path = _newest_record(root)
    if path is None:
        return {}
    try:
        return parse_record(path.read_bytes(), str(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}). Remove it, or {REBUILD}.") from None


def parse_record(data: bytes, path: str) -> dict[str, Any]:
    """index.json with its shard list checked. Raises UserError, calling it `path`, if it is unfit."""
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}). Remove it, or {REBUILD}.") from None
    if not isinstance(record, dict) or not isinstance(record.get("shardlist"), list):
        raise UserError(f"{path} has no `shardlist`. Remove it, or {REBUILD}.")
    if not isinstance(record.get("classes", []), list):
        raise UserError(f"{path}: `classes` is not a list of names.")
    seen: dict[str, Mapping[str, Any]] = {}
    for entry in record["shardlist"]:
        _check_entry(path, entry)
        file = PurePosixPath(entry["url"]).as_posix()
        if seen.setdefault(file, entry) != entry:
            raise UserError(f"{path} lists shard {file} twice, and not in the same way: {REBUILD}.")
    return record


def _check_entry(path: str, entry: object) -> None:
    if not isinstance(entry, dict) or not isinstance(entry.get("url"), str):
        raise UserError(f"{path}: an entry of `shardlist` has no `url`.")
    url = entry["url"]
    if not is_name(url):
        raise UserError(f"{path}: {url!r} is not the name of a shard inside the folder.")
    for key, most in (
        ("filesize", _LARGEST_FILE),
        *((key, MOST_HEADERS) for key in ("nsamples", *_PASSED_OVER)),
    ):
        if key in entry and not _is_count(entry[key], most):
            raise UserError(f"{path}: `{key}` of {url} is not a whole number from 0 to {most:,}.")
    if not isinstance(entry.get("sha256", ""), str):
        raise UserError(f"{path}: `sha256` of {url} is not a text.")
    labels, most = entry.get("labels", {}), entry.get("nsamples", MOST_HEADERS)
    if not isinstance(labels, dict) or not all(
        label.isdecimal() and len(label) < 8 and int(label) <= LARGEST_LABEL and _is_count(count, most)
        for label, count in labels.items()
    ):
        raise UserError(f"{path}: `labels` of {url} does not map classes to counts of its samples.")


def is_name(url: str) -> bool:
    """Whether `url` can be the name of a file inside a folder, and be shown."""
    path = PurePosixPath(url)
    if path.is_absolute() or ".." in path.parts or "://" in url:
        return False
    if not url.isprintable() and any(unicodedata.category(letter) in _UNFIT for letter in url):
        return False
    try:
        return bool(os.fsencode(url))
    except UnicodeEncodeError:
        return False


def _is_count(value: object, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most
