"""Where `shardgan prepare` takes images from: a folder, a zip, shards, or arrays of a known data set."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from stat import S_ISREG
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.config import UserError
from pipeline.credentials import redacted
from pipeline.data import npy
from pipeline.data.all_images import load_all_images
from pipeline.data.decode import FORMATS, LARGEST, BadImageError
from pipeline.data.index import Index
from pipeline.data.reader import BadSampleError, Reader, image_of
from pipeline.data.record import INDEX
from pipeline.data.tar import LARGEST_MEMBER

Fit = Literal["crop", "pad", "stretch"]
Classes = Literal["top", "path", "none"]  # which folders name the class of an image: the first, all, no
_EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class Source(Protocol):
    """Images by number. `image` is called in other processes, the rest in the one that made it."""

    @property
    def name(self) -> str: ...
    @property
    def fit(self) -> Fit: ...
    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by label; () if unlabelled."""
        ...

    @property
    def labels(self) -> NDArray[np.int64]:
        """One label per image [n], all -1 if unlabelled."""
        ...

    def fingerprint(self) -> str:
        """Another one if any of the images has changed, for all that can be seen without reading them."""
        ...

    def describe(self, number: int) -> str:
        """What to call an image in a message."""
        ...

    def image(self, number: int) -> Image.Image:
        """Raises BadImageError for what is no image, OSError for what cannot be read."""
        ...


@dataclass(frozen=True, eq=False)
class Arrays:
    """images: uint8 [n, h, w] or [n, h, w, 3]; labels: int64 [n]."""

    name: str
    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    fit: Fit = "pad"

    def fingerprint(self) -> str:
        return hashlib.sha256(self.images.tobytes() + self.labels.tobytes()).hexdigest()

    def describe(self, number: int) -> str:
        return f"image {number} of {self.name}"

    def image(self, number: int) -> Image.Image:
        return Image.fromarray(self.images[number])


@dataclass(frozen=True, eq=False)
class Folder:
    """Image files anywhere under a folder."""

    root: Path
    files: tuple[str, ...]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    fit: Fit = "crop"

    @property
    def name(self) -> str:
        return self.root.name

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name in self.files:
            with suppress(OSError):  # which is then said when it is to be read
                found = (self.root / name).stat()
                name = f"{name}\0{found.st_size}\0{found.st_mtime_ns}"
            digest.update(f"{name}\0".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def describe(self, number: int) -> str:
        return str(self.root / self.files[number])

    def image(self, number: int) -> Image.Image:
        path = self.root / self.files[number]
        found = path.stat()
        if not S_ISREG(found.st_mode):
            raise BadImageError("not a regular file")
        if found.st_size > LARGEST_MEMBER:
            raise BadImageError(f"larger than {LARGEST_MEMBER >> 20} MiB")
        return _open(path.read_bytes())


@dataclass(eq=False)
class Zip:
    """Image files in a zip. Nothing is unpacked to disk."""

    path: Path
    files: tuple[str, ...]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    fit: Fit = "crop"
    _zip: zipfile.ZipFile | None = field(default=None, repr=False)
    _process: int = 0

    @property
    def name(self) -> str:
        return self.path.stem

    def fingerprint(self) -> str:
        found = self.path.stat()
        return f"{found.st_size} {found.st_mtime_ns}"

    def describe(self, number: int) -> str:
        return f"{self.files[number]} in {self.path}"

    def image(self, number: int) -> Image.Image:
        try:
            with self._opened().open(self.files[number]) as file:
                data = file.read(LARGEST_MEMBER + 1)
        except OSError:
            raise
        except Exception as error:  # in a damaged zip each way of packing raises errors of its own
            raise BadImageError(str(error) or type(error).__name__) from None
        if len(data) > LARGEST_MEMBER:
            raise BadImageError(f"larger than {LARGEST_MEMBER >> 20} MiB")
        return _open(data)

    def _opened(self) -> zipfile.ZipFile:
        """With a file position of this process's own. A fork shares what was read of the directory, which of
        a zip of a million files takes a gigabyte."""
        if self._zip is None:
            self._zip, self._process = zipfile.ZipFile(self.path), os.getpid()
        if self._process != os.getpid():
            self._zip.fp, self._process = self.path.open("rb"), os.getpid()
        return self._zip


class Shards:
    """The images and labels of WebDataset shards; whatever else their samples hold is left behind."""

    fit: Fit = "crop"

    def __init__(self, index: Index) -> None:
        self._index, self._reader = index, Reader(index, len(index.shards))
        self._ends = np.cumsum(index.sizes)
        self.name, self.classes = index.name, index.class_names
        tables = map(index.table, range(len(index.shards)))
        self.labels: NDArray[np.int64] = np.concatenate([table.label for table in tables])

    def fingerprint(self) -> str:
        return self._index.fingerprint

    def describe(self, number: int) -> str:
        shard, row = self._place(number)
        return f"sample {self._index.table(shard).key(row)} of {self._index.path(shard)}"

    def image(self, number: int) -> Image.Image:
        try:
            sample = self._reader.read(*self._place(number))
        except BadSampleError as error:
            raise BadImageError(str(error)) from None
        return _open(image_of(sample))

    def _place(self, number: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._ends, number, side="right"))
        return shard, number - int(self._ends[shard] - self._index.sizes[shard])


def open_source(source: str, classes: Classes, announce: Callable[[str], None]) -> Source:
    """The images at a path: a folder, a zip, or shards. Raises UserError if it is none, or has no images."""
    if "://" in source:
        raise UserError(f"{redacted(source)} is not on this machine; copy it here to prepare it anew.")
    path = Path(source).expanduser()
    if path.is_dir():
        images = sorted(filter(_is_image, _files(path)))
        if not images and ((path / INDEX).exists() or any(path.glob("*.tar"))):
            return Shards(load_all_images(source, announce))
        return Folder(path.absolute(), tuple(images), *_classes(images, source, classes))
    if source.endswith(".tar"):
        return Shards(load_all_images(source, announce))
    try:
        with zipfile.ZipFile(path) as file:
            images = sorted(filter(_is_image, file.namelist()))
    except FileNotFoundError:
        raise UserError(f"There is no folder, zip, shard or known data set called {source}.") from None
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise UserError(f"{source} is neither a folder nor a zip of images ({error}).") from None
    return Zip(path.absolute(), tuple(images), *_classes(images, source, classes))


def _files(root: Path) -> Iterator[str]:
    """Names of all files below, relative to it."""
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = os.path.relpath(folder, root)
        yield from files if inside == "." else (f"{inside}/{name}" for name in files)


def _is_image(name: str) -> bool:
    path = PurePosixPath(name)
    hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
    return path.suffix.lower() in _EXTENSIONS and not hidden


def _classes(files: list[str], source: str, by: Classes) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Labels and class names. Folders that hold all there is, as zips often have one, name no class."""
    if not files:
        raise UserError(f"There are no images ({', '.join(sorted(_EXTENSIONS))}) in {source}.")
    folders = [PurePosixPath(name).parts[:-1] for name in files]
    ends = list(zip(min(folders), max(folders), strict=False))
    shared = next((i for i, (first, last) in enumerate(ends) if first != last), len(ends))
    folders = [parts[shared : shared + 1 if by == "top" else None] for parts in folders]
    if by == "none" or not any(folders):
        return np.full(len(files), -1, np.int64), ()
    if not all(folders):
        raise UserError(
            f"{source} has images both in sub-folders, which would be the classes, and beside them "
            f"({files[folders.index(())]}). Put every image into a sub-folder, or give --classes none."
        )
    numbers = {name: number for number, name in enumerate(sorted(set(folders)))}
    labels = np.array([numbers[parts] for parts in folders], np.int64)
    return labels, tuple("/".join(parts) for parts in numbers)


def _open(data: bytes) -> Image.Image:
    try:
        if data.startswith(npy.MAGIC):
            header = npy.read_header(data)
            return Image.fromarray(
                npy.read_pixels(data, header).squeeze(axis=2 if header.channels == 1 else ())
            )
        image = Image.open(io.BytesIO(data), formats=(*FORMATS, "BMP"))
        if image.width * image.height > LARGEST:
            raise BadImageError(f"{image.width}x{image.height} pixels are too many")
        image.load()
        return ImageOps.exif_transpose(image)
    except UnidentifiedImageError:  # its own message tells a memory address, another one each time
        raise BadImageError(f"not a {', '.join(FORMATS)}, BMP or .npy image") from None
    except Exception as error:  # damaged or hostile bytes make Pillow raise nearly anything
        raise BadImageError(str(error) or type(error).__name__) from None
