"""Decoding: every kind of image comes out right, and nothing large is ever decompressed."""

from __future__ import annotations

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from pipeline.data.decode import BadImageError, WrongSizeError, decode

RAMP = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
COLOUR = np.stack([RAMP, RAMP.T, 255 - RAMP], axis=2)


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_grey_and_colour_as_asked() -> None:
    grey, colour = encode(Image.fromarray(RAMP)), encode(Image.fromarray(COLOUR))
    assert (decode(grey, 8, 1) == RAMP[None]).all()
    assert (decode(grey, 8, 3) == np.stack([RAMP] * 3)).all()
    assert (decode(colour, 8, 3) == COLOUR.transpose(2, 0, 1)).all()
    luma = COLOUR @ np.array([0.299, 0.587, 0.114])
    assert np.abs(decode(colour, 8, 1)[0] - luma).max() <= 1
    assert decode(colour, 8, 3).dtype == np.uint8


@pytest.mark.parametrize(("kind", "options"), [("JPEG", {"quality": 100}), ("WEBP", {"lossless": True})])
def test_other_formats(kind: str, options: dict) -> None:
    decoded = decode(encode(Image.fromarray(RAMP), kind, **options), 8, 1)
    assert np.abs(decoded[0].astype(int) - RAMP).max() <= 4


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    image = Image.fromarray(RAMP.astype(np.uint16) * 257)
    assert image.mode == "I;16"
    assert (decode(encode(image), 8, 1)[0] == RAMP).all()


def test_transparency_is_laid_on_white() -> None:
    alpha = np.full((8, 8), 0, np.uint8)
    alpha[:4] = 255
    decoded = decode(encode(Image.fromarray(np.dstack([COLOUR, alpha]))), 8, 3)
    assert (decoded[:, :4] == COLOUR.transpose(2, 0, 1)[:, :4]).all() and (decoded[:, 4:] == 255).all()


def test_palette_and_bilevel() -> None:
    palette = Image.fromarray(COLOUR).quantize(64)
    assert (decode(encode(palette), 8, 3) == np.asarray(palette.convert("RGB")).transpose(2, 0, 1)).all()
    bilevel = Image.fromarray(RAMP > 100)
    assert (decode(encode(bilevel), 8, 1)[0] == 255 * (RAMP > 100)).all()


def header_only(width: int) -> bytes:
    header = b"IHDR" + width.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    data = b"\x89PNG\r\n\x1a\n" + b"\0\0\0\x0d" + header + zlib.crc32(header).to_bytes(4, "big")
    return data + b"\0\0\0\0IDAT" + zlib.crc32(b"IDAT").to_bytes(4, "big")


def test_size_is_known_from_the_header() -> None:
    """There is nothing behind it: had pixels been asked for, it would be a bad image."""
    with pytest.raises(WrongSizeError) as caught:
        decode(header_only(9_000), 8, 3)
    assert (caught.value.width, caught.value.height) == (9_000, 9_000)
    with pytest.raises(BadImageError, match="bomb"):
        decode(header_only(30_000), 8, 3)
    with pytest.raises(BadImageError, match="truncated"):
        decode(header_only(8), 8, 3)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello",
        encode(Image.fromarray(RAMP))[:50],
        encode(Image.fromarray(RAMP), "BMP"),
        encode(Image.fromarray(RAMP), "TIFF"),
        b"\x80\x04\x95cposix\nsystem\n.",
    ],
)
def test_what_is_no_image(data: bytes) -> None:
    with pytest.raises(BadImageError):
        decode(data, 8, 1)
