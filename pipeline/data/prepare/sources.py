"""Where `shardgan prepare` takes images from: a folder, a zip, shards, or arrays of a known data set."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.config import UserError
from pipeline.credentials import redacted
from pipeline.data.index import Index
from pipeline.data.prepare.all_images import load_all_images
from pipeline.data.prepare.contents import read_file, read_member
from pipeline.data.prepare.labels import Classes, Labels, label, renumbered, some
from pipeline.data.prepare.listing import EXTENSIONS, LeftOut, Listing, by_kind, list_folder, list_zip
from pipeline.data.prepare.pictures import Fit, LeftOutError, Picture, open_picture
from pipeline.data.reader import BadSampleError, Reader, image_of
from pipeline.data.record import INDEX
from pipeline.data.samples import PassedOver
from pipeline.data.tar import LARGEST_MEMBER

_LARGEST_LABELS = 128 << 20  # bytes of a dataset.json


class Source(Protocol):
    """Images by number. `image` is called in other processes, the rest in the one that made it."""

    @property
    def name(self) -> str: ...
    @property
    def fit(self) -> Fit: ...
    @property
    def labelled(self) -> Labels: ...
    @property
    def left_out(self) -> Sequence[LeftOut]:
        """Files that are no images."""
        ...

    @property
    def tables(self) -> Sequence[str]:
        """Those of them that may hold labels, which nobody reads."""
        ...

    def __len__(self) -> int:
        """How many images there are."""
        ...

    def fingerprint(self) -> str:
        """Another one if any of the images has changed, for all that can be seen without reading them."""
        ...

    def path(self, number: int) -> str:
        """Where an image is, relative to the source."""
        ...

    def describe(self, number: int) -> str:
        """What to call an image in a message that may be published: no path of this machine."""
        ...

    def image(self, number: int) -> Picture:
        """Raises LeftOutError for what is no image, or cannot be read."""
        ...


@dataclass(frozen=True, eq=False)
class Arrays:
    """images: uint8 [n, h, w] or [n, h, w, 3]; labels: int64 [n]."""

    name: str
    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    fit: Fit = "pad"
    left_out: Sequence[LeftOut] = ()
    tables: Sequence[str] = ()

    @property
    def labelled(self) -> Labels:
        return Labels(self.labels, self.classes, "its authors")

    def __len__(self) -> int:
        return len(self.images)

    def fingerprint(self) -> str:
        return hashlib.sha256(self.images.tobytes() + self.labels.tobytes()).hexdigest()

    def path(self, number: int) -> str:
        return f"image {number}"

    def describe(self, number: int) -> str:
        return f"image {number} of {self.name}"

    def image(self, number: int) -> Picture:
        return Picture(Image.fromarray(self.images[number]))


@dataclass(frozen=True, eq=False)
class Folder:
    """Image files anywhere under a folder."""

    root: Path
    files: Sequence[str]
    labelled: Labels
    left_out: Sequence[LeftOut]
    tables: Sequence[str]
    fit: Fit = "crop"

    @property
    def name(self) -> str:
        return self.root.name

    def __len__(self) -> int:
        return len(self.files)

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.labelled.values.tobytes())
        for name in self.files:
            with suppress(OSError):  # which is then said when it is to be read
                found = os.stat(f"{self.root}/{name}")  # noqa: PTH116  a million of them
                name = f"{name}\0{found.st_size}\0{found.st_mtime_ns}"
            digest.update(f"{name}\0".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def path(self, number: int) -> str:
        return self.files[number]

    def describe(self, number: int) -> str:
        return f"{self.name}/{self.files[number]}"

    def image(self, number: int) -> Picture:
        return open_picture(read_file(self.root / self.files[number], LARGEST_MEMBER))


@dataclass(eq=False)
class Zip:
    """Image files in a zip. Nothing is unpacked to disk."""

    file: Path
    members: Sequence[zipfile.ZipInfo]
    files: Sequence[str]
    labelled: Labels
    left_out: Sequence[LeftOut]
    tables: Sequence[str]
    fit: Fit = "crop"
    _zip: zipfile.ZipFile | None = field(default=None, repr=False)
    _process: int = 0

    @property
    def name(self) -> str:
        return self.file.stem

    def __len__(self) -> int:
        return len(self.files)

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.labelled.values.tobytes())
        for name, member in zip(self.files, self.members, strict=True):
            text = f"{name}\0{member.file_size}\0{member.CRC}\0"
            digest.update(text.encode(errors="surrogateescape"))
        return digest.hexdigest()

    def path(self, number: int) -> str:
        return self.files[number]

    def describe(self, number: int) -> str:
        return f"{self.files[number]} in {self.file.name}"

    def image(self, number: int) -> Picture:
        return open_picture(read_member(self._opened(), self.members[number], LARGEST_MEMBER))

    def _opened(self) -> zipfile.ZipFile:
        """With a file position of this process's own. A fork shares what was read of the directory, which of
        a zip of a million files takes a gigabyte."""
        if self._zip is None:
            self._zip, self._process = zipfile.ZipFile(self.file), os.getpid()
        if self._process != os.getpid():
            self._zip.fp, self._process = self.file.open("rb"), os.getpid()
        return self._zip


class Shards:
    """The images and labels of WebDataset shards; whatever else their samples hold is left behind."""

    fit: Fit = "crop"
    tables: Sequence[str] = ()

    def __init__(self, index: Index) -> None:
        self._index, self._reader = index, Reader(index, len(index.shards))
        self._ends = np.cumsum(index.sizes)
        self.name = index.name
        tables = [index.table(shard) for shard in range(len(index.shards))]
        values = np.concatenate([table.label for table in tables])
        self.left_out = [
            item
            for shard, table in zip(index.shards, tables, strict=True)
            for kind, what in (("no image", table.without_image), ("unusable", table.unusable))
            for item in _passed_over(shard.url, kind, what)
        ]
        self.labelled = renumbered(values, index.class_names, "the shards")
        if not len(values) or values.max() < 0:
            keys = (table.key(row) for table in tables for row in range(len(table)))
            self.labelled = replace(self.labelled, warnings=_about_folders(keys))

    def __len__(self) -> int:
        return len(self.labelled.values)

    def fingerprint(self) -> str:
        return self._index.fingerprint

    def path(self, number: int) -> str:
        shard, row = self._place(number)
        return f"{self._index.shards[shard].url}/{self._index.table(shard).key(row)}"

    def describe(self, number: int) -> str:
        shard, row = self._place(number)
        return f"sample {self._index.table(shard).key(row)} of {self._index.shards[shard].url}"

    def image(self, number: int) -> Picture:
        try:
            sample = self._reader.read(*self._place(number))
        except BadSampleError as error:
            raise LeftOutError("damaged", str(error)) from None
        return open_picture(image_of(sample))

    def _place(self, number: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._ends, number, side="right"))
        return shard, number - int(self._ends[shard] - self._index.sizes[shard])


def _passed_over(shard: str, kind: str, what: PassedOver) -> Iterator[LeftOut]:
    """The samples of a shard that have no image to use: the first of them one by one."""
    yield from (LeftOut(shard, kind, reason) for reason in what.reasons)
    if more := what.count - len(what.reasons):
        yield LeftOut(shard, kind, f"{more:,} more samples like these", more)


def _about_folders(keys: Iterable[str]) -> tuple[str, ...]:
    """A tar of class folders can be read as a shard, but a shard has its labels in .cls files."""
    folders = sorted({key.rpartition("/")[0] for key in keys if "/" in key})
    if len(folders) < 2:
        return ()
    return (
        f"the folders {some(folders)} of the shards are not taken for classes. If they are, unpack the "
        "shards and prepare the folder.",
    )


def open_source(
    source: str, classes: Classes, announce: Callable[[str], None], without: Path | None = None
) -> Source:
    """The images at a path: a folder (but those in the folder `without`), a zip, or shards.

    Raises UserError if it is none, has no images, or labels that cannot be used.
    """
    if "://" in source:
        raise UserError(f"{redacted(source)} is not on this machine; copy it here to prepare it anew.")
    path = Path(source).expanduser()
    if path.is_dir():
        return _open_folder(path, source, classes, announce, without)
    if source.lower().endswith(".tar"):
        return _open_shards(source, announce)
    try:
        return _open_zip(path, source, classes)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"There is no folder, zip, shard or known data set called {source}.") from None
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise UserError(
            f"{source} is neither a folder nor a zip of images ({error}). Unpack archives of other kinds."
        ) from None


def _open_folder(
    path: Path, source: str, classes: Classes, announce: Callable[[str], None], without: Path | None
) -> Source:
    root = path.absolute()
    tars, listed = any(path.glob("*.tar")), (path / INDEX).exists()
    if tars and listed:
        return _open_shards(source, announce)
    listing = list_folder(root, without)
    if not listing.images and (tars or listed):
        return _open_shards(source, announce)
    _refuse_none(listing, source)
    labels = label(listing, classes, source, lambda name: read_file(root / name, _LARGEST_LABELS))
    left_out = [replace(item, name=f"{root.name}/{item.name}") for item in listing.left_out]
    return Folder(root, listing.images, labels, left_out, listing.tables)


def _open_shards(source: str, announce: Callable[[str], None]) -> Source:
    return Shards(load_all_images(source, announce))


def _open_zip(path: Path, source: str, classes: Classes) -> Source:
    with zipfile.ZipFile(path) as file:
        listing, members = list_zip(file.infolist())
        _refuse_none(listing, source)
        labels = label(
            listing, classes, source, lambda name: read_member(file, members[name], _LARGEST_LABELS)
        )
    found = [members[name] for name in listing.images]
    left_out = [replace(item, name=f"{item.name} in {path.name}") for item in listing.left_out]
    return Zip(path.absolute(), found, listing.images, labels, left_out, listing.tables)


def _refuse_none(listing: Listing, source: str) -> None:
    if not listing.images:
        there = f" It has: {by_kind(listing.left_out)}." if listing.left_out else ""
        raise UserError(f"There are no images ({', '.join(sorted(EXTENSIONS))}) in {source}.{there}")
