"""One image file → a square picture of the wanted size, and what was done to it."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageColor, ImageOps, TiffImagePlugin, UnidentifiedImageError

from pipeline.data.decode import (
    FORMATS,
    LARGEST,
    NPY_MAGIC,
    BadImageError,
    read_header,
    read_latent,
    read_npy,
    read_npy_header,
    to_channels,
)
from pipeline.data.prepare.colours import in_srgb

_T = TypeVar("_T")
Fit = Literal["crop", "pad", "stretch"]
# More than training reads: decoders in Pillow or its wheels that run and load nothing.
_FORMATS = (*FORMATS, "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
_MOST = {"JPEG2000": LARGEST // 4, "AVIF": LARGEST // 2}  # pixels; their decoders take far more memory
_BITS, _TILE_WIDTH, _TILE_LENGTH = 258, 322, 323  # tags of TIFF
SIDE = "side "
_ALPHA = ("RGBA", "LA", "PA", "La", "RGBa")


class LeftOutError(BadImageError):
    """A file that no image can be made of. A summary counts by `kind`."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


class Picture(NamedTuple):
    """An image as in its file, upright. `first`: of several, in an animation or on pages."""

    image: Image.Image
    first: bool = False


class Look(NamedTuple):
    """What the header of an image says: pixels, as they are stored, and whether it is grey."""

    width: int
    height: int
    grey: bool


class Latent(NamedTuple):
    """A latent as in its file, `data`."""

    data: bytes
    shape: tuple[int, int, int]
    dtype: str


class Fitted(NamedTuple):
    """An 8-bit grey or RGB image of the wanted size. `facts`: what a summary counts, also SIDE and its
    shorter side before."""

    image: Image.Image
    facts: tuple[str, ...]


def open_picture(data: bytes) -> Picture | Latent:
    """Raises LeftOutError for bytes that are neither image nor latent, or none that can be used."""
    return _tried(data, _opened)


def look(data: bytes) -> Look | Latent:
    """As `open_picture`, without decoding the pixels of an image: those may still be damaged."""
    return _tried(data, _looked)


def _tried(data: bytes, read: Callable[[bytes], _T]) -> _T:
    """Raises LeftOutError for whatever `read` raises."""
    if not data:
        raise LeftOutError("empty", "an empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an image is read, or left out with its reason
            return read(data)
    except LeftOutError:
        raise
    except UnidentifiedImageError:  # its own message has a memory address
        raise LeftOutError("unreadable", f"not a {', '.join(_FORMATS)} or .npy image") from None
    except Image.DecompressionBombError:
        raise LeftOutError("too many pixels", f"more than {LARGEST:,} pixels are too many") from None
    except Exception as error:  # damaged or hostile bytes make Pillow raise nearly anything
        raise LeftOutError("unreadable", str(error) or type(error).__name__) from None


def _looked(data: bytes) -> Look | Latent:
    if not data.startswith(NPY_MAGIC):
        image = _header(data)
        return Look(image.width, image.height, is_grey(image))
    found = _array(data)
    return found if isinstance(found, Latent) else Look(*found.image.size, is_grey(found.image))


def _opened(data: bytes) -> Picture | Latent:
    if data.startswith(NPY_MAGIC):
        return _array(data)
    image = _header(data)
    # An MPO's second image, of another lens or for a preview, is no page.
    first = bool(getattr(image, "is_animated", False)) and image.format != "MPO"
    image.load()
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        raise LeftOutError(
            "32-bit pixels", f"pixels of 32 bits (mode {image.mode}); convert it to 8 or 16 bits"
        )
    if image.mode == "LAB":  # which Pillow converts to nothing else
        return Picture(image.convert("RGB"), first)
    bits = image.tag_v2.get(_BITS, (16,))[0] if isinstance(image, TiffImagePlugin.TiffImageFile) else 16
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") and bits < 16:  # as scientific cameras have; Pillow leaves the values
        values = np.asarray(image, np.int64) * 65535 // (2**bits - 1)
        image = Image.fromarray(values.clip(0, 65535).astype(np.uint16))
    return Picture(image, first)


def _header(data: bytes) -> Image.Image:
    """An image whose pixels are not decoded yet. Raises LeftOutError for too many of them."""
    image = Image.open(io.BytesIO(data), formats=_FORMATS)
    most = _MOST.get(image.format or "", LARGEST)
    if image.width * image.height > most:
        raise LeftOutError("too many pixels", f"{image.width}x{image.height} pixels are too many")
    if _tile(image) > most:
        raise LeftOutError("too many pixels", f"tiles of {_tile(image):,} pixels are too many")
    return image


def is_grey(image: Image.Image) -> bool:
    return image.mode in ("L", "1", "LA") or image.mode[0] == "I"


def _array(data: bytes) -> Picture | Latent:
    """An array that is no image, as its shape or values show, is a latent."""
    try:
        header = read_npy_header(data)
        pixels = read_npy(data, header)
        return Picture(Image.fromarray(pixels.squeeze(axis=2 if header.channels == 1 else ())))
    except ValueError as no_image:
        try:
            latent = read_latent(data)
        except BadImageError as no_latent:
            found = read_header(data)
            meant = found.dtype.kind == "f" and len(found.shape) == 3 and found.shape[2] not in (1, 3)
            raise (no_latent if meant else no_image) from None
    channels, height, width = latent.shape
    return Latent(data, (channels, height, width), str(latent.dtype))


def _tile(image: Image.Image) -> int:
    """Pixels of a TIFF's tile, which may be larger than the image."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return 0
    width, height = (int(image.tag_v2.get(tag, 0)) for tag in (_TILE_WIDTH, _TILE_LENGTH))
    return width * height


def fitted(
    picture: Picture, size: int, fit: Fit | None, channels: int | None, background: str | None
) -> Fitted | None:
    """The picture at size x size. None if it has another size and `fit` is None.

    channels: 1, 3, or None to keep grey and colour. background: see Options. Raises LeftOutError for modes
    that cannot be converted.
    """
    image, first = picture
    grey = channels == 1 or (channels is None and is_grey(image))
    facts = ["grey" if grey else "colour", f"{SIDE}{min(image.size)}"]
    if image.mode in _ALPHA or ("transparency" in image.info and image.mode[0] != "I"):
        facts.append("transparent")
    if first:
        facts.append("first of several")
    image, converted = in_srgb(image)
    if converted:
        facts.append("converted")
    try:
        image = to_channels(image, 1 if grey else 3, background or "white")
    except ValueError as error:
        raise LeftOutError("unreadable", str(error)) from None
    if image.size == (size, size):
        return Fitted(image, tuple(facts))
    if fit is None:
        return None
    smaller = min(image.size) < size
    if fit == "pad":  # smaller images keep their pixels
        image.thumbnail((size, size), Image.Resampling.LANCZOS)
        if image.size != (size, size):
            facts.append("padded")
            image = _padded(image, size, background or "black")
    else:
        facts += ["enlarged"] if smaller else []
        facts += ["cropped" if fit == "crop" else "stretched"] if image.width != image.height else []
        image = (
            ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
            if fit == "crop"
            else image.resize((size, size), Image.Resampling.LANCZOS)
        )
    return Fitted(image, tuple(facts))


def _padded(image: Image.Image, size: int, background: str) -> Image.Image:
    padded = Image.new(image.mode, (size, size), ImageColor.getcolor(background, image.mode))
    padded.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return padded


def png(image: Image.Image) -> bytes:
    """Without the colour profile of the file it was made of, which may be larger than the pixels."""
    data = io.BytesIO()
    image.save(data, "PNG", compress_level=6, icc_profile=None)
    return data.getvalue()
