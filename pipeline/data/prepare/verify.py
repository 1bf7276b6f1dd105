"""Every byte of the shards against what index.json and the sidecars say of them.

A run trusts its index: it checks file sizes when it starts and a sample's CRC when it reads it. Here
everything is read, once, and every problem is reported, not only the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config import UserError
from pipeline.data import sidecar
from pipeline.data.index import in_threads
from pipeline.data.locate import Location, locate
from pipeline.data.record import INDEX, sidecars
from pipeline.data.sidecar import SampleTable
from pipeline.wording import counted

Entry = Mapping[str, Any]  # of a shard in index.json; empty if it is not listed there


@dataclass(frozen=True, eq=False)
class Verified:
    """One shard as it is. `problems`: what is wrong, naming the shard and, if known, the byte."""

    url: str
    problems: tuple[str, ...]
    filesize: int = 0
    against: tuple[str, ...] = ()  # what it was compared with: index.json, its sidecar
    # CRC and size of each sample's image: equal for equal images.
    images: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))
    unlabelled: int = 0

    @property
    def nsamples(self) -> int:
        return len(self.images)


def verify(train: str, progress: Callable[[int, int], None] = lambda done, total: None) -> list[Verified]:
    """Read all shards of `train`, on this machine, several at a time, and compare them with their index.

    `progress` gets (bytes done, bytes in all). The result takes 8 bytes per sample. Raises UserError only if
    there is nothing to verify: no shards, or an unfit index.json.
    """
    location = locate(train)
    known = location.entries
    urls = sorted({*location.urls, *location.unlisted})
    sizes = {url: int(known.get(url, {}).get("filesize", 0)) or _size(location.root / url) for url in urls}
    total, done = sum(sizes.values()), 0
    found = []
    for url, shard in zip(urls, in_threads(partial(_verify, location, known), urls), strict=True):
        found.append(shard)
        done += sizes[url]
        progress(done, total)
    return found


def _verify(location: Location, known: Mapping[str, Entry], url: str) -> Verified:
    entry, where = known.get(url, {}), f"shard {url} in {location.root}"
    try:
        table = sidecar.scan(location.root / url, url)
    except FileNotFoundError:
        return Verified(url, (f"{where} is missing, although {INDEX} lists it.",))
    except OSError as error:
        return Verified(url, (f"{where} cannot be read: {error.strerror or error}.",))
    except UserError as error:  # not a whole tar: it names shard and byte
        size = _size(location.root / url)
        shorter = "filesize" in entry and size != entry["filesize"]
        more = f" It has {counted(size, 'byte')}, {INDEX} says {entry['filesize']:,}." if shorter else ""
        return Verified(url, (f"{error}{more}",))
    # A sidecar of another file than the one in index.json is never used, but built again.
    indexed = [t for t in sidecars(location.root, url) if t.sha256 == entry.get("sha256", t.sha256)]
    problems = [f"{where} is not listed in {INDEX}."] if known and not entry else []
    problems += _against_index(table, entry, where)
    for old in indexed[:1]:
        problems += _against_sidecar(table, old, url)
    against = ((INDEX,) if "sha256" in entry else ()) + (("sidecar",) if indexed else ())
    unlabelled = int((table.label < 0).sum())
    return Verified(url, tuple(problems), table.filesize, against, table.crc_and_size, unlabelled)


def _against_index(table: SampleTable, entry: Entry, where: str) -> Iterator[str]:
    labels = {str(label): count for label, count in table.label_counts().items()}
    found: dict[str, Any] = {"filesize": table.filesize, "nsamples": len(table), "labels": labels}
    names = {"filesize": "byte", "nsamples": "sample"}
    for key, value in found.items():
        if key in entry and entry[key] != value:
            what = (
                f"{counted(value, names[key])}, {INDEX} says {entry[key]:,}"
                if key in names
                else (f"other labels than {INDEX} says")
            )
            yield f"{where} has {what}."
    if entry.get("sha256", table.sha256) != table.sha256:
        yield f"{where} is not the file that {INDEX} describes (another SHA-256)."


def _against_sidecar(table: SampleTable, indexed: SampleTable, url: str) -> Sequence[str]:
    """Where exactly a shard differs from what it was when it was indexed."""
    if len(table) != len(indexed):
        return [f"shard {url} has {counted(len(table), 'sample')}, its sidecar lists {len(indexed):,}."]
    same = (table.crc == indexed.crc) & (table.size == indexed.size) & (table.offset == indexed.offset)
    said = []
    for rows, problem in (
        (np.flatnonzero(~same), "is not what was indexed (wrong CRC)"),
        (np.flatnonzero(same & (table.label != indexed.label)), "has another label than was indexed"),
    ):
        if len(rows):
            row = int(rows[0])
            more = f" And so for {counted(len(rows) - 1, 'more sample')}." if len(rows) > 1 else ""
            said.append(f"shard {url}, byte {table.offset[row]}: sample {table.key(row)!r} {problem}.{more}")
    if table.names != indexed.names:
        said.append(f"shard {url} has other sample names than its sidecar lists.")
    return said


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
