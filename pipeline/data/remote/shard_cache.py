"""Remote shards on this node's disk: bounded, and shared by all ranks, workers and runs.

A file is named by its SHA-256, and has that name only when it is whole and checked. Locks are `flock`s on the
files themselves, which the kernel releases when a process dies, however it dies:

- a reader of NAME.tar holds a shared lock on it; to remove it takes the exclusive one;
- the one process of the node that fetches it holds the exclusive lock on NAME.SIZE.part; the others wait;
- a process that makes room or starts to fetch locks the folder's `.lock`, so that sums are right.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from pipeline.config import UserError
from pipeline.data.record import Shard
from pipeline.data.remote.disk import PassingError
from pipeline.data.remote.transfer import Patience

_POLL_S = 0.05
_PASSING_S = 1.0  # how often a disk is looked at that was full, or had lost the file
# Names of this cache's own files. All others in the folder stay.
_WHOLE = re.compile(r"[0-9a-f]{64}\.tar")
_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW  # in a common cache another user's link may lead to a file of ours
_PART = re.compile(r"(?:[0-9a-f]{32}|[0-9a-f]{64})\.(\d{1,19})\.part", re.ASCII)

Fetch = Callable[[Path], None]  # makes the file there whole, or raises


class ShardCache:
    """Whole shards in `folder`, at most `limit` bytes of them."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self._limit = folder, limit

    def open(self, shard: Shard, fetch: Fetch, patience: Patience) -> int:
        """A file descriptor of the shard, fetched if need be. The file is not removed while it is open.

        Fetches even if the cache is full of shards that are being read. If the disk is full it waits for
        room: other processes may give some back. If the file is removed meanwhile it is fetched again. Raises
        UserError, also if another process takes too long to fetch the shard.
        """
        passing: PassingError | None = None
        while True:
            with self._complaints():
                file, room = self._held(shard), passing is not None
                if file is None and (part := self._claim(shard, patience, bounded=False, room=room)):
                    try:
                        file = self._fill(part, shard, fetch)
                    except PassingError as error:
                        passing = error
            if file is not None:
                return file
            if patience.over:
                raise passing or UserError(
                    f"shard {shard.url}: another process has been fetching it into {self.folder} for "
                    f"{patience.timeout_s:g} s (data.remote.timeout_s)."
                )
            patience.pause(_PASSING_S if passing else _POLL_S)

    def ahead(self, shard: Shard, fetch: Fetch, patience: Patience, keep: Collection[str]) -> None:
        """Fetch a shard for later, unless another process does, or there is no room without removing one of
        `keep` (SHA-256)."""
        with self._complaints():
            here = self.path(shard).exists()
            part = None if here else self._claim(shard, patience, keep, bounded=True, room=True)
            if part is not None:
                os.close(self._fill(part, shard, fetch))

    def add(self, make: Callable[[Path], Shard], patience: Patience) -> Shard:
        """Keep a shard whose SHA-256 is known only when `make` has fetched it."""
        with self._complaints():
            with self._locked(patience):
                path = self.folder / f"{uuid4().hex}.0.part"
                file = os.open(path, os.O_RDWR | os.O_CREAT | _FLAGS, 0o666)
                fcntl.flock(file, fcntl.LOCK_EX)
            try:
                shard = make(path)
                with self._locked(patience):
                    path.replace(self.path(shard))
                    self._make_room(0, keep=())
                return shard
            finally:
                path.unlink(missing_ok=True)
                os.close(file)

    def path(self, shard: Shard) -> Path:
        """Where a shard lies if it is here."""
        return self.folder / f"{shard.sha256}.tar"

    def _held(self, shard: Shard) -> int | None:
        """The shard, locked against removal; None if it is not here."""
        path = self.path(shard)
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        if _lock(file, fcntl.LOCK_SH) and _is_at(file, path) and os.fstat(file).st_size == shard.filesize:
            with suppress(PermissionError):  # another user's, in a common cache
                os.utime(file)
            return file
        os.close(file)
        _remove_damaged(path, shard.filesize)
        return None

    def _claim(
        self, shard: Shard, patience: Patience, keep: Collection[str] = (), *, bounded: bool, room: bool
    ) -> tuple[int, Path] | None:
        """The right to fetch a shard; None if it is here, or being fetched, or does not fit into the limit
        (if `bounded`) or on the disk (if `room`)."""
        with self._locked(patience):
            path = self.folder / f"{shard.sha256}.{shard.filesize}.part"
            # In this order: a process that finishes at this moment renames the one to the other.
            if not _remove_unused(path) or self.path(shard).exists():
                return None
            excess, lack = self._make_room(shard.filesize, keep)
            if (bounded and excess > 0) or (room and lack > 0):
                return None
            file = os.open(path, os.O_RDWR | os.O_CREAT | _FLAGS, 0o666)
            if _lock(file, fcntl.LOCK_EX):
                return file, path
            os.close(file)
            return None

    def _fill(self, part: tuple[int, Path], shard: Shard, fetch: Fetch) -> int:
        file, path = part
        try:
            fetch(path)
            path.replace(self.path(shard))
        except BaseException:
            path.unlink(missing_ok=True)
            os.close(file)
            raise
        fcntl.flock(file, fcntl.LOCK_SH)  # does not wait: others lock a new file for an instant at most
        return file

    def _make_room(self, size: int, keep: Collection[str]) -> tuple[int, int]:
        """Remove the least recently read until `size` more bytes fit. Returns how many are still too many for
        the limit, and for the disk."""
        used, unwritten, removable = 0, 0, []
        for entry in self.folder.iterdir():
            if part := _PART.fullmatch(entry.name):
                if not _removed(entry):  # it can be removed if its process was killed
                    used += int(part[1])
                    with suppress(FileNotFoundError):  # it is whole by now
                        # Not st_size: gcsfs makes a file as long as it will be before it writes it.
                        unwritten += max(0, int(part[1]) - entry.stat().st_blocks * 512)
            elif _WHOLE.fullmatch(entry.name):
                try:
                    status = entry.stat()
                except FileNotFoundError:  # a damaged copy, removed at this moment
                    continue
                used += status.st_size
                if entry.stem not in keep:
                    removable.append((status.st_mtime_ns, status.st_size, entry))
        excess = used + size - self._limit
        # The disk may have less room than the limit, and transfers under way will fill some of it.
        lack = size + unwritten - shutil.disk_usage(self.folder).free
        for _, freed, entry in sorted(removable):
            if max(excess, lack) <= 0:
                break
            if _removed(entry):
                excess, lack = excess - freed, lack - freed
        return excess, lack

    @contextmanager
    def _locked(self, patience: Patience) -> Iterator[None]:
        """Only one process makes room at a time."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = _common_lock(self.folder / ".lock")
        try:
            while not _lock(file, fcntl.LOCK_EX):
                if patience.over:
                    raise UserError(f"{self.folder / '.lock'} has been locked for {patience.timeout_s:g} s.")
                patience.pause(_POLL_S)
            yield
        finally:
            os.close(file)

    @contextmanager
    def _complaints(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"Remote shards cannot be kept in {self.folder} ({error.strerror or error}). Set "
                "data.remote.folder to a folder on a disk of this machine."
            ) from None


def _lock(file: int, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _opened(path: Path) -> int:
    """For an exclusive lock, which NFS grants only to who may write."""
    try:
        return os.open(path, os.O_RDWR | _FLAGS)
    except PermissionError:  # another user's, in a common cache
        return os.open(path, os.O_RDONLY | _FLAGS)


def _common_lock(path: Path) -> int:
    """A file for locks that every user of a common cache can take, whatever the umask of the first."""
    with suppress(FileNotFoundError):
        return _opened(path)
    file = os.open(path, os.O_RDWR | os.O_CREAT | _FLAGS, 0o666)
    with suppress(PermissionError):  # on file systems without modes
        os.fchmod(file, 0o666)
    return file


def _is_at(file: int, path: Path) -> bool:
    """Whether an open file is still the one at a path."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file), path.stat())
    return False


def _remove_unused(path: Path) -> bool:
    """Remove a file unless a process holds a lock on it. Of a link, itself."""
    if path.is_symlink():
        path.unlink(missing_ok=True)
        return True
    try:
        file = _opened(path)
    except FileNotFoundError:
        return True
    try:
        if not _lock(file, fcntl.LOCK_EX):
            return False
        path.unlink(missing_ok=True)
        return True
    finally:
        os.close(file)


def _remove_damaged(path: Path, size: int) -> None:
    """Remove a file of another size, cut by a crash of the machine or a full disk, that no process reads."""
    with suppress(FileNotFoundError):
        file = _opened(path)
        try:
            if os.fstat(file).st_size != size and _lock(file, fcntl.LOCK_EX) and _is_at(file, path):
                path.unlink(missing_ok=True)
        finally:
            os.close(file)


def _removed(path: Path) -> bool:
    """As _remove_unused; what only another user may remove stays."""
    with suppress(PermissionError):
        return _remove_unused(path)
    return False
