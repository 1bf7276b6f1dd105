"""Where `shardgan prepare` takes images from: a folder, a zip, or arrays of a known data set."""

from __future__ import annotations

import io
import os
import zipfile
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pipeline.config import UserError
from pipeline.data.decode import FORMATS, LARGEST, BadImageError
from pipeline.data.tar import LARGEST_MEMBER

Fit = Literal["crop", "pad", "stretch"]
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

    def describe(self, number: int) -> str:
        return f"image {number} of {self.name}"

    def image(self, number: int) -> Image.Image:
        return Image.fromarray(self.images[number])


@dataclass(frozen=True, eq=False)
class Folder:
    """Image files under a folder; its sub-folders, if it has any, are the classes."""

    root: Path
    files: tuple[str, ...]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    fit: Fit = "crop"

    @property
    def name(self) -> str:
        return self.root.name

    def describe(self, number: int) -> str:
        return str(self.root / self.files[number])

    def image(self, number: int) -> Image.Image:
        path = self.root / self.files[number]
        if path.stat().st_size > LARGEST_MEMBER:
            raise BadImageError(f"larger than {LARGEST_MEMBER >> 20} MiB")
        return _open(path.read_bytes())


@dataclass(eq=False)
class Zip:
    """Image files in a zip; its folders, if it has any, are the classes. Nothing is unpacked to disk."""

    path: Path
    files: tuple[str, ...]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    fit: Fit = "crop"
    _opened: tuple[int, zipfile.ZipFile] | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        return self.path.stem

    def describe(self, number: int) -> str:
        return f"{self.files[number]} in {self.path}"

    def image(self, number: int) -> Image.Image:
        if self._opened is None or self._opened[0] != os.getpid():  # processes must not share a file position
            self._opened = (os.getpid(), zipfile.ZipFile(self.path))
        try:
            with self._opened[1].open(self.files[number]) as file:
                data = file.read(LARGEST_MEMBER + 1)
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
            raise BadImageError(str(error)) from None
        if len(data) > LARGEST_MEMBER:
            raise BadImageError(f"larger than {LARGEST_MEMBER >> 20} MiB")
        return _open(data)


def open_source(source: str) -> Source:
    """The images at a path: a folder or a zip. Raises UserError if it is neither, or has no images."""
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
        images = [name for name in files if _is_image(name)]
        if not images and any(name.endswith(".tar") for name in files):
            raise UserError(
                f"{path} holds shards already. `shardgan prepare {source} --index-only` builds their index."
            )
        return Folder(path.absolute(), *_classes(images, source))
    try:
        with zipfile.ZipFile(path) as file:
            images = sorted(info.filename for info in file.infolist() if _is_image(info.filename))
    except FileNotFoundError:
        raise UserError(f"There is no folder, zip or known data set called {source}.") from None
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{source} is neither a folder nor a zip of images ({error}).") from None
    return Zip(path.absolute(), *_classes(images, source))


def _is_image(name: str) -> bool:
    path = PurePosixPath(name)
    hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
    return path.suffix.lower() in _EXTENSIONS and not hidden


def _classes(files: list[str], source: str) -> tuple[tuple[str, ...], NDArray[np.int64], tuple[str, ...]]:
    """Files, their labels and the class names. The class is the first folder in which the paths differ."""
    if not files:
        raise UserError(f"There are no images ({', '.join(sorted(_EXTENSIONS))}) in {source}.")
    parts = [PurePosixPath(name).parts for name in files]
    while all(len(p) > 1 for p in parts) and len({p[0] for p in parts}) == 1:
        parts = [p[1:] for p in parts]  # zips often hold one folder that holds everything
    loose = sum(len(p) == 1 for p in parts)
    if loose == len(parts):
        return tuple(files), np.full(len(files), -1, np.int64), ()
    if loose:
        name = files[next(i for i, p in enumerate(parts) if len(p) == 1)]
        raise UserError(
            f"{source} has images both in sub-folders, which would be the classes, and beside them ({name}). "
            "Put every image into a sub-folder, or all into one folder."
        )
    classes = tuple(sorted({p[0] for p in parts}))
    numbers = {name: number for number, name in enumerate(classes)}
    return tuple(files), np.array([numbers[p[0]] for p in parts], np.int64), classes


def _open(data: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=(*FORMATS, "BMP"))
        if image.width * image.height > LARGEST:
            raise BadImageError(f"{image.width}x{image.height} pixels are too many")
        image.load()
        return ImageOps.exif_transpose(image)
    except Exception as error:  # damaged or hostile bytes make Pillow raise nearly anything
        raise BadImageError(str(error) or type(error).__name__) from None
