"""Image files, or latents, in a folder or a zip; and what there is at a path: such files, or shards."""

from __future__ import annotations

import errno
import os
import stat
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from pipeline.config import UserError, expanded
from pipeline.credentials import redacted
from pipeline.data.prepare.known import KNOWN
from pipeline.data.prepare.labels import Classes, Labels, label, some
from pipeline.data.prepare.listing import (
    ARRAY,
    EXTENSIONS,
    LINKED,
    Listing,
    by_kind,
    list_folder,
    list_zip,
)
from pipeline.data.prepare.pictures import LeftOutError
from pipeline.data.prepare.shards import Shards, all_images
from pipeline.data.prepare.source import Stored
from pipeline.data.record import INDEX
from pipeline.data.tar import LARGEST_MEMBER
from pipeline.wording import did_you_mean

_LABELS_OF_ONE = 1 << 10  # bytes of a dataset.json for each image, path included …
_LABELS_OF_OTHERS = 8 << 20  # … and for images that are not there; read, it takes 30 times its size


class Folder(Stored):
    """Image files anywhere under a folder."""

    def __init__(self, root: Path, listing: Listing, labelled: Labels) -> None:
        left_out = [replace(item, name=f"{root.name}/{item.name}") for item in listing.left_out]
        super().__init__(root.name, labelled, left_out, listing.tables)
        self._root, self._files = root, listing.images

    def fingerprint(self) -> str:
        return self.digest(map(self._about, self._files))

    def _about(self, name: str) -> str:
        with suppress(OSError):  # which is said when the file is read
            found = os.stat(f"{self._root}/{name}")  # noqa: PTH116  a million of them
            return f"{name}\0{found.st_size}\0{found.st_mtime_ns}"
        return name

    def path(self, number: int) -> str:
        return self._files[number]

    def describe(self, number: int) -> str:
        return f"{self.name}/{self._files[number]}"

    def read(self, number: int) -> bytes:
        return _read_file(self._root / self._files[number], LARGEST_MEMBER)


class Zip(Stored):
    """Image files in a zip. Nothing is unpacked to disk."""

    def __init__(
        self,
        path: Path,
        file: zipfile.ZipFile,
        listing: Listing,
        members: Mapping[str, zipfile.ZipInfo],
        labelled: Labels,
    ) -> None:
        left_out = [replace(item, name=f"{item.name} in {path.name}") for item in listing.left_out]
        super().__init__(path.stem, labelled, left_out, listing.tables)
        self._path, self._files = path, listing.images
        self._members = [members[name] for name in listing.images]
        self._zip, self._process = file, os.getpid()

    def fingerprint(self) -> str:
        members = zip(self._files, self._members, strict=True)
        return self.digest(f"{name}\0{member.file_size}\0{member.CRC}" for name, member in members)

    def path(self, number: int) -> str:
        return self._files[number]

    def describe(self, number: int) -> str:
        return f"{self._files[number]} in {self._path.name}"

    def read(self, number: int) -> bytes:
        # A forked process shares the directory, a gigabyte for a million files, but needs its own position.
        if self._process != os.getpid():
            self._zip.fp, self._process = self._path.open("rb"), os.getpid()
        return _read_member(self._zip, self._members[number], LARGEST_MEMBER)


def open_source(
    source: str, classes: Classes, announce: Callable[[str], None], without: Path | None = None
) -> Stored:
    """The images at a path: a folder (but those in the folder `without`), a zip, or shards.

    Raises UserError if it is none, has no images, or labels that cannot be used.
    """
    if "://" in source:
        raise UserError(f"{redacted(source)} is not on this machine; copy it here to prepare it.")
    path = expanded(source)
    if path.is_dir():
        return _open_folder(path, source, classes, announce, without)
    if source.lower().endswith(".tar"):
        return Shards(all_images(source, announce), classes)
    try:
        return _open_zip(path, source, classes)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(
            f"There is no folder, zip, shard or known data set called {source}.{did_you_mean(path, KNOWN)}"
        ) from None
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise UserError(
            f"{source} is neither a folder nor a zip of images ({error}). Unpack archives of other kinds."
        ) from None


def _open_folder(
    path: Path, source: str, classes: Classes, announce: Callable[[str], None], without: Path | None
) -> Stored:
    root = path.absolute()
    tars = any(name.lower().endswith(".tar") for name in os.listdir(path))  # noqa: PTH208  names alone
    listed = (path / INDEX).exists()
    if tars and listed:
        return Shards(all_images(source, announce), classes)
    listing = list_folder(root, without)
    if (tars or listed) and all(name.lower().endswith(ARRAY) for name in listing.images):
        return Shards(all_images(source, announce), classes)
    _refuse_none(listing, source)
    if links := sorted(left.name for left in listing.left_out if left.kind == LINKED):
        announce(f"warning: links to folders are not followed: {some(links)}")
    most = _largest_labels(listing)
    labels = label(listing, classes, source, lambda name: _read_file(root / name, most))
    return Folder(root, listing, labels)


def _open_zip(path: Path, source: str, classes: Classes) -> Stored:
    file = zipfile.ZipFile(path)
    listing, members = list_zip(file.infolist())
    _refuse_none(listing, source)
    most = _largest_labels(listing)
    labels = label(listing, classes, source, lambda name: _read_member(file, members[name], most))
    return Zip(path.absolute(), file, listing, members, labels)


def _largest_labels(listing: Listing) -> int:
    return _LABELS_OF_OTHERS + _LABELS_OF_ONE * len(listing.images)


def _refuse_none(listing: Listing, source: str) -> None:
    if not listing.images:
        there = f" It has: {by_kind(listing.left_out)}." if listing.left_out else ""
        raise UserError(f"There are no images ({', '.join(sorted(EXTENSIONS))}) in {source}.{there}")


def _read_file(path: Path, most: int) -> bytes:
    """A whole regular file of at most so many bytes. Raises LeftOutError."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise LeftOutError("no regular files", "not a regular file")
        if found.st_size > most:
            raise LeftOutError("too large", f"larger than {most >> 20} MiB")
        return path.read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOENT, errno.ELOOP) and path.is_symlink():
            raise LeftOutError("links that lead nowhere", f"a link that leads nowhere ({reason})") from None
        denied = error.errno in (errno.EACCES, errno.EPERM)
        raise LeftOutError("no permission" if denied else "unreadable", reason) from None


def _read_member(file: zipfile.ZipFile, member: zipfile.ZipInfo, most: int) -> bytes:
    """A whole file in a zip, of at most so many bytes. Raises LeftOutError."""
    try:
        with file.open(member) as opened:
            data = opened.read(most + 1)
    except Exception as error:  # in a damaged zip each way of packing raises errors of its own
        locked = isinstance(error, RuntimeError) and member.flag_bits & 1
        reason = "encrypted" if locked else str(error) or type(error).__name__
        raise LeftOutError("encrypted" if locked else "unreadable", reason) from None
    if len(data) > most:
        raise LeftOutError("too large", f"larger than {most >> 20} MiB")
    return data
