"""Bytes → the array of an image, uint8, or of a latent, float32.

Images: only formats on a list, and no pixel is decoded before the size is known. Latents are what an encoder
of the user's has made of images, `.npy` arrays [channels, size, size] of float16 or float32. They are taken
as they are, neither scaled nor clipped. No `.npy` is unpickled, whatever it says.
"""

from __future__ import annotations

import io
import math
import struct
import warnings
import zlib
from typing import Any, NamedTuple

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.config import Data

try:  # twice as fast on JPEGs as Pillow, with the same library and the same pixels
    import simplejpeg
except (ImportError, ValueError):  # the latter: an old one, built for another numpy
    simplejpeg = None

FORMATS = ("PNG", "JPEG", "WEBP")
LARGEST = 1 << 26  # pixels: what an image to be resized may have
_PNG_HEAD = struct.Struct(
    ">12s4xII5sII4s"
)  # signature, header chunk with its CRC, the next one's length and name
_PNG_START, _PNG_END = b"\x89PNG\r\n\x1a\n\0\0\0\r", b"\0\0\0\0IEND\xaeB`\x82"
_PLAIN = {b"\x08\0\0\0\0": "L", b"\x08\x02\0\0\0": "RGB"}  # 8 bits of grey or colour, not interlaced
_ORIENTED = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}  # may hold an orientation
NPY_MAGIC = npy_format.MAGIC_PREFIX
_NPY_VERSIONS = {(1, 0): npy_format.read_array_header_1_0, (2, 0): npy_format.read_array_header_2_0}
_LARGEST_NPY_HEADER = 1000  # characters: those of plain arrays have about 70
_LATENTS = (np.dtype(np.float16), np.dtype(np.float32))  # in this machine's order of bytes


class BadImageError(ValueError):
    """Bytes that are not an image of an allowed format, or not a whole one."""


class WrongSizeError(ValueError):
    """An image of another size than asked for. `width` and `height` are what it has."""

    def __init__(self, width: int, height: int) -> None:
        super().__init__(width, height)
        self.width, self.height = width, height


def decode(data: bytes, size: int, channels: int) -> NDArray[np.uint8]:
    """An image (PNG, JPEG, WebP, or a .npy array, see ImageHeader) as uint8 [channels, size, size].

    Grey becomes colour and colour grey as `channels` (1 or 3) asks; EXIF rotations are carried out. Raises
    WrongSizeError before anything is decompressed, and BadImageError for bytes that are no image.
    """
    try:
        if data.startswith(_PNG_START):
            pixels = _plain_png(data, size, channels)
        elif data.startswith(NPY_MAGIC):
            pixels = _npy(data, size, channels)
        else:
            pixels = _plain_jpeg(data, size, channels)
        if pixels is None:
            pixels = _pillow(data, size, channels)
    except WrongSizeError:
        raise
    except UnidentifiedImageError:  # its own message has a memory address
        raise BadImageError(f"not a whole {', '.join(FORMATS)} or .npy image") from None
    except Exception as error:  # damaged or hostile bytes make decoders raise nearly anything
        raise BadImageError(str(error) or type(error).__name__) from None
    return pixels.reshape(size, size, channels).transpose(2, 0, 1)


def _pillow(data: bytes, size: int, channels: int) -> NDArray[np.uint8]:
    with warnings.catch_warnings(), Image.open(io.BytesIO(data), formats=FORMATS) as image:
        warnings.simplefilter("ignore")  # of damaged metadata
        if image.size != (size, size):
            raise WrongSizeError(*image.size)
        image.load()  # a PNG's orientation may follow its pixels
        upright = ImageOps.exif_transpose(image) if not _ORIENTED.isdisjoint(image.info) else image
        return np.frombuffer(to_channels(upright, channels).tobytes(), np.uint8)


def _plain_png(data: bytes, size: int, channels: int) -> NDArray[np.uint8] | None:
    """By Pillow's decoder, without its walk through the file, which takes longer than a small image.

    None if there is more in this PNG than 8-bit grey or colour in one piece.
    """
    if len(data) < _PNG_HEAD.size:
        return None
    _, width, height, kind, crc, length, name = _PNG_HEAD.unpack_from(data)
    end = _PNG_HEAD.size + length + 4  # with the CRC of the pixels, which Pillow does not read either
    if kind not in _PLAIN or name != b"IDAT" or data[end:] != _PNG_END or zlib.crc32(data[12:29]) != crc:
        return None
    if (width, height) != (size, size):
        raise WrongSizeError(width, height)
    mode = _PLAIN[kind]
    image = Image.frombytes(mode, (size, size), data[_PNG_HEAD.size : end - 4], "zip", mode, 0)
    return np.frombuffer(to_channels(image, channels).tobytes(), np.uint8)


def _plain_jpeg(data: bytes, size: int, channels: int) -> NDArray[np.uint8] | None:
    """By simplejpeg, if installed; None if this is not a JPEG, or one for Pillow: with metadata (it may be
    rotated), in CMYK, in colour but wanted in grey, which Pillow weighs after the conversion to RGB, or
    damaged: whether a part of it will do is then the same with and without simplejpeg."""
    if simplejpeg is None or not data.startswith(b"\xff\xd8") or b"Exif\0" in data or b"ns.adobe.com" in data:
        return None
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if (width, height) != (size, size):
        raise WrongSizeError(width, height)
    if space != "Gray" and (space != "YCbCr" or channels == 1):
        return None
    try:
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "GRAY" if channels == 1 else "RGB")
    except ValueError:
        return None
    return pixels


def _npy(data: bytes, size: int, channels: int) -> NDArray[np.uint8]:
    header = read_npy_header(data)
    if (header.width, header.height) != (size, size):
        raise WrongSizeError(header.width, header.height)
    pixels = read_npy(data, header)
    if pixels.shape[2] == channels:
        return pixels
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    return np.asarray(image.convert("L" if channels == 1 else "RGB"))


def to_channels(image: Image.Image, channels: int, background: str = "white") -> Image.Image:
    """The image in 8-bit grey (1) or RGB (3): 16 bits scaled down, transparency laid on `background`."""
    mode = "L" if channels == 1 else "RGB"
    if image.mode == mode and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        # Pillow would clip at 255. Grey PNGs of 16 bits open as "I;16", or as "I" with the same values.
        values = np.asarray(image, np.int64).clip(0, 65535)
        image = Image.fromarray((values // 257).astype(np.uint8))
    elif image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image.convert(mode)


class NpyHeader(NamedTuple):
    """What an array is. `offset`: of the first number, in bytes."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]
    offset: int


def read_header(data: bytes) -> NpyHeader:
    """Of the bytes of a .npy. Raises ValueError if they are none, or of objects."""
    file = io.BytesIO(data)
    version = npy_format.read_magic(file)
    if version not in _NPY_VERSIONS:
        raise ValueError(f"a .npy of version {version}")
    shape, fortran, dtype = _NPY_VERSIONS[version](file, max_header_size=_LARGEST_NPY_HEADER)
    if dtype.hasobject:
        raise ValueError(f"a .npy of {dtype}; only plain numbers are read")
    return NpyHeader(shape, fortran, dtype, file.tell())


def read_numbers(data: bytes, header: NpyHeader) -> NDArray[Any]:
    """The array, a view of `data`. Raises ValueError if it has more or fewer numbers than its header says."""
    expected = math.prod(header.shape) * header.dtype.itemsize
    if len(data) - header.offset != expected:
        raise ValueError(f"a .npy with {len(data) - header.offset} bytes of numbers, not {expected}")
    numbers = np.frombuffer(data, header.dtype, offset=header.offset)
    return numbers.reshape(header.shape, order="F" if header.fortran else "C")


class ImageHeader(NamedTuple):
    """Of an array [H, W], [H, W, 1 or 3] or [1 or 3, H, W] of uint8, or of floats from 0 (black) to 1."""

    height: int
    width: int
    channels: int
    channels_first: bool
    npy: NpyHeader


def read_npy_header(data: bytes) -> ImageHeader:
    """What the array is, without reading it. Raises ValueError for anything but an image's array."""
    header = read_header(data)
    shape, dtype = header.shape, header.dtype
    if not (dtype == np.uint8 or (dtype.kind == "f" and dtype.itemsize <= 8)):
        raise ValueError(f"a .npy of {dtype}; images are uint8, or floats from 0 to 1")
    channels_first = len(shape) == 3 and shape[2] not in (1, 3)
    whole = (*shape[1:], shape[0]) if channels_first else (*shape, 1)[:3]
    if len(shape) not in (2, 3) or whole[2] not in (1, 3) or min(shape) < 1:
        raise ValueError(
            f"a .npy of shape {list(shape)}; images are [H, W], [H, W, 1 or 3] or [1 or 3, H, W]"
        )
    height, width, channels = whole
    return ImageHeader(height, width, channels, channels_first, header)


def read_npy(data: bytes, header: ImageHeader) -> NDArray[np.uint8]:
    """uint8 [H, W, channels]. Raises ValueError if there are more or fewer numbers than the header says."""
    array = read_numbers(data, header.npy)
    if header.channels_first:
        array = array.transpose(1, 2, 0)
    array = array.reshape(header.height, header.width, header.channels)
    if header.npy.dtype.kind == "f":
        if not (array.min() >= 0 and array.max() <= 1):  # NaN fails too
            raise ValueError(f"a .npy of floats from {array.min():g} to {array.max():g}, not 0 to 1")
        array = np.rint(array.astype(np.float64) * 255)
    return np.ascontiguousarray(array, np.uint8)


def dtype_of(data: Data) -> np.dtype[Any]:
    """Of samples in batches: uint8 for images; for latents float32, which holds every float16 exactly."""
    return np.dtype(np.float32 if data.latents else np.uint8)


def read_latent(data: bytes) -> NDArray[Any]:
    """The bytes of a .npy → float16 or float32 [C, size, size], a view of them.

    Raises BadImageError, with the reason, for anything else, and for numbers that are not finite.
    """
    if not data.startswith(NPY_MAGIC):
        raise BadImageError("not a .npy array, as latents are")
    try:
        header = read_header(data)
        latent = read_numbers(data, header)
    except Exception as error:  # hostile bytes make numpy raise nearly anything
        raise BadImageError(str(error) or type(error).__name__) from None
    shape = header.shape
    if header.dtype not in _LATENTS or len(shape) != 3 or shape[1] != shape[2] or min(shape) < 1:
        raise BadImageError(
            f"a .npy of {header.dtype} {list(shape)}; latents are float16 or float32 [channels, size, size]"
        )
    if not np.isfinite(latent).all():
        raise BadImageError("a latent with numbers that are not finite")
    return latent


def decode_latent(data: bytes, size: int, channels: int) -> NDArray[np.float32]:
    """The bytes of a .npy → float32 [channels, size, size].

    Raises BadImageError, as `read_latent` does, and for a latent of another shape.
    """
    latent = read_latent(data)
    if latent.shape != (channels, size, size):
        raise BadImageError(
            f"a latent of shape {list(latent.shape)}, not [data.channels, data.size, data.size] = "
            f"{[channels, size, size]}"
        )
    return latent.astype(np.float32, copy=False)
