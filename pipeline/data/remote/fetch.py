"""Remote shards of an index: fetched when they are needed, or a little before."""

from __future__ import annotations

import hashlib
import io
import os
import re
import sys
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.config import Remote, UserError, expanded
from pipeline.data import sidecar
from pipeline.data.record import (
    INDEX,
    WHOLE,
    Shard,
    is_complete,
    parse_record,
    read_record,
    shard_of,
    sidecar_path,
)
from pipeline.data.remote.shard_cache import ShardCache
from pipeline.data.remote.transfer import Patience, WrongBytesError, download, names_in, read
from pipeline.data.remote.urls import RemoteFolder
from pipeline.durable import FULL
from pipeline.folders import cache_folder

_LARGEST_INDEX = 1 << 30  # bytes
_LARGEST_SIDECAR = 1 << 30


@dataclass(frozen=True)
class RemoteShards:
    """A folder of shards at a URL, and how they are kept here. Cheap to send to worker processes."""

    folder: RemoteFolder
    settings: Remote

    def __str__(self) -> str:
        return f"shards from {self.folder}, kept in {self.cache.folder} (at most {self.settings.gb:g} GB)"

    @property
    def home(self) -> Path:
        """Where its index and sidecars are on this machine, whatever the credentials."""
        return cache_folder() / "index" / hashlib.sha256(os.fsencode(str(self.folder))).hexdigest()[:24]

    @property
    def cache(self) -> ShardCache:
        return ShardCache(_shards_folder(self.settings), int(self.settings.gb * 1e9))

    def record(self, names: Collection[str] | None, tell: Callable[[str], None]) -> dict[str, Any]:
        """index.json: made here by `shardgan prepare --index-only` if that had these names (None: the whole
        folder), else the folder's; {} if none."""
        ours = read_record(self.home)
        listed = {entry["url"] for entry in ours.get("shardlist", ())}
        if ours and (ours.get(WHOLE, True) if names is None else listed.issuperset(names)):
            return ours
        return self.published(tell)

    def published(self, tell: Callable[[str], None]) -> dict[str, Any]:
        """The folder's own index.json; {} if none."""
        try:
            data = read(self.folder, INDEX, Patience(self.settings), most=_LARGEST_INDEX, tell=tell)
        except FileNotFoundError:
            return {}
        return parse_record(data, self.folder.show(INDEX))

    def list(self, tell: Callable[[str], None]) -> tuple[str, ...]:
        """The names of the shards in the folder, from the server's own listing."""
        try:
            names = names_in(self.folder, Patience(self.settings), tell)
        except FileNotFoundError:
            names = set()
        return tuple(sorted(name for name in names if name.endswith(".tar") and name[0] not in "./"))

    def open(self, shard: Shard) -> int:
        """A file descriptor of the whole shard, which is not removed while it is open."""
        patience = Patience(self.settings)
        return self.cache.open(shard, lambda part: self._fetch(shard, part, patience, _warn), patience)

    def ahead(self, shard: Shard, keep: Collection[str], stop: threading.Event) -> None:
        """Fetch a shard for later if there is room without removing those in `keep` (SHA-256).

        In one attempt, so that a reader that waits for the shard soon finds out what is wrong.
        """
        patience = Patience(self.settings, stop, attempts=1)
        self.cache.ahead(shard, lambda part: self._fetch(shard, part, patience), patience, keep)

    def table(self, shard: Shard) -> sidecar.SampleTable:
        """Where the samples of a shard lie: from a sidecar, here or beside the shard, else from the shard."""
        patience = Patience(self.settings)
        table = self._sidecar(shard, patience)
        if table is None:
            file = self.open(shard)  # walks it if it is fetched only now
            try:
                table = self._sidecar(shard, patience) or self._scan(self.cache.path(shard), shard.url)
            finally:
                os.close(file)
        sidecar.check(table, shard.url, shard.filesize, shard.sha256)
        return table

    def check_room(self, sizes: Sequence[int], window: int) -> None:
        """Raises UserError if the two windows of shards that are needed at once do not fit."""
        needed = sum(sorted(sizes)[-2 * window :])
        if needed > self.settings.gb * 1e9:
            raise UserError(
                f"data.remote.gb={self.settings.gb:g} is too little: two windows of {window} shards "
                f"(data.window) need up to {needed / 1e9:.3g} GB. Give {self.cache.folder} more, or make the "
                "window smaller."
            )

    def index(self, url: str, tell: Callable[[str], None]) -> Shard:
        """Fetch a shard that no index lists, and index it. Raises UserError if its name is unfit."""
        sidecar_path(self.home, url)
        patience = Patience(self.settings)

        def make(path: Path) -> Shard:
            try:
                download(self.folder, url, path, patience, most=None, tell=tell)
            except FileNotFoundError as error:
                raise UserError(f"{error}.") from None
            return shard_of(url, self._scan(path, url))

        return self.cache.add(make, patience)

    def _fetch(
        self, shard: Shard, part: Path, patience: Patience, tell: Callable[[str], None] = lambda _: None
    ) -> None:
        """A shard into the file `part`, checked, with its sidecar."""
        try:
            check = partial(_check, shard, part)
            download(self.folder, shard.url, part, patience, most=shard.filesize, check=check, tell=tell)
        except FileNotFoundError as error:
            raise UserError(f"{error}, although {INDEX} lists it.") from None
        if self._sidecar(shard, patience.brief()) is None:  # others wait for the shard, which is here
            self._scan(part, shard.url)

    def _sidecar(self, shard: Shard, patience: Patience) -> sidecar.SampleTable | None:
        path = sidecar_path(self.home, shard.url)
        table = sidecar.load(path)
        if table is not None and table.sha256 == shard.sha256:
            return table
        try:
            name = str(sidecar_path(Path(), shard.url))
            data = read(self.folder, name, patience, most=_LARGEST_SIDECAR)
        except (FileNotFoundError, UserError):
            return None  # without it the shard is walked
        table = sidecar.load(io.BytesIO(data))
        if table is None or (table.sha256, table.filesize) != (shard.sha256, shard.filesize):
            return None
        self._keep(table, shard.url)
        return table

    def _scan(self, path: Path, url: str) -> sidecar.SampleTable:
        table = sidecar.scan(path, self.folder.show(url))
        self._keep(table, url)
        return table

    def _keep(self, table: sidecar.SampleTable, url: str) -> None:
        """A full disk is no error: the sidecar is read again, or the shard walked."""
        try:
            sidecar.save(table, sidecar_path(self.home, url))
        except OSError as error:
            if error.errno in FULL:
                return
            raise UserError(
                f"{self.home} cannot be written ({error.strerror}). Set SHARDGAN_CACHE to a folder with room."
            ) from None


def is_verifiable(entry: Mapping[str, Any]) -> bool:
    """Whether an entry of index.json says all that a remote shard is checked against."""
    return is_complete(entry) and bool(re.fullmatch("[0-9a-f]{64}", entry["sha256"]))


def _warn(problem: str) -> None:
    """Of a shard that is needed now: the training waits. What is fetched ahead fails without a word."""
    lead = "\n" if sys.stderr.isatty() else ""  # there may be a progress bar on this line
    print(f"{lead}warning: {problem}", file=sys.stderr, flush=True)


def _shards_folder(remote: Remote) -> Path:
    """Raises UserError if data.remote.folder names a variable that is not set, or the home of nobody."""
    chosen = remote.folder
    if not chosen:
        return cache_folder() / "shards"
    for name in re.findall(r"\$(\w+|\{[^}]*\})", chosen, re.ASCII):
        if not os.environ.get(name.strip("{}")):
            raise UserError(
                f"data.remote.folder={chosen}: the variable {name.strip('{}')} is not set on this machine. "
                "Set it, or name a folder on one of its disks."
            )
    return expanded(os.path.expandvars(chosen)).absolute()


def _check(shard: Shard, path: Path) -> None:
    """Raises WrongBytesError unless the file is the shard that was indexed."""
    size = path.stat().st_size
    if size != shard.filesize:
        raise WrongBytesError(f"it has {size:,} bytes, not the {shard.filesize:,} that {INDEX} says")
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != shard.sha256:
        raise WrongBytesError(
            f"its SHA-256 is {sha256[:16]}…, not the {shard.sha256[:16]}… that {INDEX} says: it was changed "
            "or damaged there. If that was on purpose, run `shardgan prepare --index-only` on its URL"
        )
