"""One image file → a square picture of the size wanted, and what was done to it."""

from __future__ import annotations

import io
import warnings
from typing import Literal, NamedTuple

from PIL import Image, ImageColor, ImageOps, TiffImagePlugin, UnidentifiedImageError

from pipeline.data.decode import (
    FORMATS,
    LARGEST,
    NPY_MAGIC,
    BadImageError,
    read_npy,
    read_npy_header,
    to_channels,
)

Fit = Literal["crop", "pad", "stretch"]
# Beyond what training reads: decoders of Pillow's own, or in its wheels, that run nothing and load nothing.
_FORMATS = (*FORMATS, "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
_MOST = {"JPEG2000": LARGEST // 4, "AVIF": LARGEST // 2}  # pixels; their decoders take far more memory
_TILE_WIDTH, _TILE_LENGTH = 322, 323  # tags of TIFF
_ALPHA = ("RGBA", "LA", "PA", "La", "RGBa")


class LeftOutError(BadImageError):
    """A file that no image can be made of. `kind` is what it is counted by."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


class Picture(NamedTuple):
    """An image as it is in its file, upright. `first`: there are more, of an animation or on other pages."""

    image: Image.Image
    first: bool = False


class Fitted(NamedTuple):
    """An 8-bit grey or RGB image of the size wanted. `facts`: what a summary counts."""

    image: Image.Image
    facts: tuple[str, ...]


def open_picture(data: bytes) -> Picture:
    """Raises LeftOutError for bytes that are no image, or none that can be used."""
    if not data:
        raise LeftOutError("empty", "an empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an image is read, or left out with its reason
            return _opened(data)
    except LeftOutError:
        raise
    except UnidentifiedImageError:  # its own message tells a memory address, another one each time
        raise LeftOutError("unreadable", f"not a {', '.join(_FORMATS)} or .npy image") from None
    except Image.DecompressionBombError:
        raise LeftOutError("too many pixels", f"more than {LARGEST:,} pixels are too many") from None
    except Exception as error:  # damaged or hostile bytes make Pillow raise nearly anything
        raise LeftOutError("unreadable", str(error) or type(error).__name__) from None


def _opened(data: bytes) -> Picture:
    if data.startswith(NPY_MAGIC):
        header = read_npy_header(data)
        pixels = read_npy(data, header)
        return Picture(Image.fromarray(pixels.squeeze(axis=2 if header.channels == 1 else ())))
    image = Image.open(io.BytesIO(data), formats=_FORMATS)
    most = _MOST.get(image.format or "", LARGEST)
    if image.width * image.height > most:
        raise LeftOutError("too many pixels", f"{image.width}x{image.height} pixels are too many")
    if _tile(image) > most:
        raise LeftOutError("too many pixels", f"tiles of {_tile(image):,} pixels are too many")
    # Photographs may carry a second image, of another lens or for a preview; that is no page.
    first = bool(getattr(image, "is_animated", False)) and image.format != "MPO"
    image.load()
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        raise LeftOutError(
            "32-bit pixels", f"pixels of 32 bits (mode {image.mode}); convert it to 8 or 16 bits"
        )
    if image.mode == "LAB":  # which Pillow converts to nothing else
        return Picture(image.convert("RGB"), first)
    return Picture(ImageOps.exif_transpose(image), first)


def _tile(image: Image.Image) -> int:
    """Pixels of a tile, which in a TIFF may be larger than the image."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return 0
    width, height = (int(image.tag_v2.get(tag, 0)) for tag in (_TILE_WIDTH, _TILE_LENGTH))
    return width * height


def fitted(
    picture: Picture, size: int, fit: Fit | None, channels: int | None, background: str | None
) -> Fitted | None:
    """The picture at size x size. None if it has another size and `fit` is None.

    channels: 1 or 3, None for grey as grey and colour as colour. background: what transparency is laid on
    and padding filled with; None: white and black. Raises LeftOutError for modes that cannot be converted.
    """
    image, first = picture
    grey = channels == 1 or (channels is None and (image.mode in ("L", "1", "LA") or image.mode[0] == "I"))
    facts = ["grey" if grey else "colour"]
    if image.mode in _ALPHA or ("transparency" in image.info and image.mode[0] != "I"):
        facts.append("transparent")
    if first:
        facts.append("first of several")
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
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    padded = Image.new(image.mode, (size, size), ImageColor.getcolor(background, image.mode))
    padded.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return padded


def png(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG", compress_level=6)
    return data.getvalue()
