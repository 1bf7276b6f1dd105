"""What is written of each image of a source: a PNG of the wanted size, or a latent as it is."""

from __future__ import annotations

from dataclasses import asdict
from typing import NamedTuple

from pipeline.config import UserError
from pipeline.data.prepare.pictures import Latent, LeftOutError, Picture, fitted, png
from pipeline.data.prepare.source import Options, Resolved, Source

_OF_IMAGES = ("size", "fit", "channels", "background")  # options that mean nothing for latents


class Made(NamedTuple):
    """A member of a sample. `facts`: what a summary counts."""

    extension: str
    data: bytes
    facts: tuple[str, ...]


def resolve(images: Source, options: Options) -> Resolved:
    """The options with what the first image that can be read decides: the size, or that it is a latent.

    Raises UserError if none can be read and no size is given, if it is not square, or if it is a latent and
    options are given that are for images.
    """
    first, name = _first(images, needed=options.size is None)
    if isinstance(first, Latent):
        given = [f"--{key}" for key in _OF_IMAGES if getattr(options, key) is not None]
        if given:
            raise UserError(
                f"{name} is a latent {list(first.shape)}, and latents are written as they are: leave out "
                f"{' and '.join(given)}."
            )
        return Resolved(**asdict(options) | {"size": first.shape[1], "latents": first.shape})
    if options.size is not None:
        return Resolved(**asdict(options) | {"fit": options.fit or images.fit})
    assert first is not None
    width, height = first.image.size
    if width != height:
        raise UserError(
            f"{name} is {width}x{height}, not square. Give --size N (and --fit crop, pad or stretch)."
        )
    # Without --size no image may be changed: another size than the first one's is an error.
    return Resolved(**asdict(options) | {"size": width, "fit": None})


def make(images: Source, number: int, options: Resolved) -> Made:
    """An image at the size and in the channels wanted, or a latent as it is.

    Raises LeftOutError for what cannot be read, and for an image among latents or the reverse; UserError for
    another size, or shape, than that of the first.
    """
    found = images.image(number)
    if isinstance(found, Latent):
        if options.latents is None:
            raise LeftOutError("latents", "a latent among images")
        if found.shape != options.latents:
            raise UserError(
                f"{images.describe(number)} is a latent {list(found.shape)}, the first "
                f"{list(options.latents)}. All latents of a data set have one shape."
            )
        return Made("npy", found.data, (found.dtype,))
    if options.latents is not None:
        raise LeftOutError("images", "an image among latents")
    assert options.size is not None
    made = fitted(found, options.size, options.fit, options.channels, options.background)
    if made is None:
        width, height = found.image.size
        raise UserError(
            f"{images.describe(number)} is {width}x{height}, the first image {options.size}x{options.size}. "
            "Give --size N (and --fit crop, pad or stretch)."
        )
    return Made("png", png(made.image), made.facts)


def none_can_be_read(images: Source, reason: str) -> UserError:
    return UserError(f"None of the {len(images):,} images of {images.name} can be read: {reason}")


def _first(images: Source, needed: bool) -> tuple[Picture | Latent | None, str]:
    """The first image that can be read, and its name; None, "" if there is none and none is `needed`."""
    reason = ""
    for number in range(len(images)):
        try:
            return images.image(number), images.describe(number)
        except LeftOutError as error:
            reason = reason or str(error)
    if needed:
        raise none_can_be_read(images, reason)
    return None, ""
