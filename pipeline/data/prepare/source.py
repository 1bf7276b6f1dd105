"""Where `shardgan prepare` takes images from, and how it is to write them."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.config import UserError
from pipeline.data.prepare.labels import Classes, Labels
from pipeline.data.prepare.listing import LeftOut
from pipeline.data.prepare.pictures import Fit, Latent, Look, Picture, look, open_picture


def refuse_count(name: str, value: object) -> None:
    """Raise UserError for what is no number from 1, nor None."""
    if value is not None and not (isinstance(value, Integral) and int(value) >= 1):
        raise UserError(f"{name}={value!r}: give a whole number from 1.")


@dataclass(frozen=True)
class Options:
    """How images are written. None: as the source suggests (size, fit) or as each image is (channels).

    background: what is under transparency and in padding: white, black or #rrggbb. None: white and black.
    dedupe: leave out images that are another one's copy as they are written.

    Raises UserError for a value that there is not.
    """

    size: int | None = None
    fit: Fit | None = None
    channels: int | None = None
    per_shard: int = 1000
    classes: Classes = "top"
    background: str | None = None
    dedupe: bool = False

    def __post_init__(self) -> None:
        choices = {"fit": (None, *get_args(Fit)), "channels": (None, 1, 3), "classes": get_args(Classes)}
        for name, known in choices.items():
            if (value := getattr(self, name)) not in known:
                raise UserError(f"{name}={value!r}: choose one of {', '.join(map(str, known))}.")
        for name in ("size", "per_shard"):
            refuse_count(name, getattr(self, name))


@dataclass(frozen=True)
class Resolved(Options):
    """Options that fit the images there are. latents: their shape, if they are that."""

    latents: tuple[int, int, int] | None = None


@dataclass(eq=False)
class Source(ABC):
    """Images by number. `image` is called in other processes, the rest in the one that made it.

    left_out: files that are no images; tables: those of them that may hold labels, but are not read; fit: how
    an image gets to another size by default.
    """

    name: str
    labelled: Labels
    left_out: Sequence[LeftOut] = ()
    tables: Sequence[str] = ()
    fit: Fit = "crop"

    def __len__(self) -> int:
        """How many images there are."""
        return len(self.labelled.values)

    @abstractmethod
    def fingerprint(self) -> str:
        """Another one if any image has changed, as far as can be seen without reading them."""

    @abstractmethod
    def path(self, number: int) -> str:
        """Where an image is, relative to the source."""

    @abstractmethod
    def describe(self, number: int) -> str:
        """What to call an image in a message that may be published: no path of this machine."""

    @abstractmethod
    def image(self, number: int) -> Picture | Latent:
        """Raises LeftOutError for what is no image or cannot be read."""

    def digest(self, about: Iterable[str]) -> str:
        """Of the labels, and a text about each image."""
        digest = hashlib.sha256(self.labelled.values.tobytes())
        for text in about:
            digest.update(f"{text}\0".encode(errors="surrogateescape"))
        return digest.hexdigest()


class Stored(Source):
    """Images that lie as bytes in files or shards."""

    @abstractmethod
    def read(self, number: int) -> bytes:
        """Raises LeftOutError for what cannot be read."""

    def image(self, number: int) -> Picture | Latent:
        return open_picture(self.read(number))

    def look(self, number: int) -> Look | Latent:
        """Size and colours of an image, without decoding it. Raises LeftOutError as `image` does."""
        return look(self.read(number))


class Arrays(Source):
    """images: uint8 [n, h, w] or [n, h, w, 3]; labels: int64 [n]."""

    def __init__(
        self, name: str, images: NDArray[np.uint8], labels: NDArray[np.int64], classes: tuple[str, ...]
    ) -> None:
        super().__init__(name, Labels(labels, classes, "its authors"), fit="pad")
        self.images = images

    def fingerprint(self) -> str:
        return hashlib.sha256(self.images.tobytes() + self.labelled.values.tobytes()).hexdigest()

    def path(self, number: int) -> str:
        return f"image {number}"

    def describe(self, number: int) -> str:
        return f"image {number} of {self.name}"

    def image(self, number: int) -> Picture:
        return Picture(Image.fromarray(self.images[number]))
