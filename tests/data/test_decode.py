"""Decoding: every kind of image comes out right, and nothing large is ever decompressed."""

from __future__ import annotations

import io
import zlib
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from pipeline.data import decode as decoding
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


@pytest.fixture(params=["simplejpeg", "pillow"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With simplejpeg, and as if it were not installed."""
    if request.param == "simplejpeg":
        pytest.importorskip("simplejpeg")
    else:
        monkeypatch.setattr(decoding, "simplejpeg", None)
    return str(request.param)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpegs_are_the_same_by_either_decoder(either: str, subsampling: int, progressive: bool) -> None:
    smooth = Image.fromarray(noise(6, 6, 3)).resize((32, 32), Image.Resampling.BICUBIC)
    data = encode(smooth, "JPEG", quality=90, subsampling=subsampling, progressive=progressive)
    for channels, mode in ((3, "RGB"), (1, "L")):
        expected = np.asarray(Image.open(io.BytesIO(data)).convert(mode), np.int16)
        decoded = decode(data, 32, channels).astype(np.int16)
        assert np.abs(decoded.transpose(1, 2, 0) - expected.reshape(32, 32, channels)).max() <= 1


def test_jpegs_through_simplejpeg(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast route is taken at all: Pillow is not asked for a plain colour or grey JPEG."""
    pytest.importorskip("simplejpeg")
    jpegs = [encode(Image.fromarray(pixels), "JPEG") for pixels in (COLOUR, RAMP)]
    monkeypatch.setattr(decoding, "_pillow", None)
    assert [decode(data, 8, 3).shape for data in jpegs] == [(3, 8, 8)] * 2
    assert decode(jpegs[1], 8, 1).shape == (1, 8, 8)


def test_damaged_jpegs_are_refused(either: str) -> None:
    data = encode(Image.fromarray(noise(64, 64, 3)), "JPEG")
    for cut in (3, 100, len(data) // 2, len(data) - 40):
        with pytest.raises(BadImageError):
            decode(data[:cut], 64, 3)
    with pytest.raises(WrongSizeError):
        decode(data, 32, 3)


def test_whether_a_damaged_jpeg_will_do_is_up_to_one_decoder(either: str) -> None:
    """A scan that ends too soon, with the mark of the end: a grey rest is decoded, or nobody decodes it."""
    data = encode(Image.fromarray(noise(64, 64, 3)), "JPEG")
    cut = data[: len(data) // 2] + b"\xff\xd9"
    assert np.array_equal(decode(cut, 64, 3), np.asarray(Image.open(io.BytesIO(cut))).transpose(2, 0, 1))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_pictures_come_out_upright(either: str, kind: str, orientation: int) -> None:
    """A camera held sideways: four grey quarters end up where EXIF says (its table, for the value 1 to 8)."""
    quarters = np.kron(np.array([[10, 90], [170, 250]], np.uint8), np.ones((16, 16), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(quarters).convert("RGB")
    options = {"lossless": True} if kind == "WEBP" else {}
    decoded = decode(encode(stored, kind, exif=exif.tobytes(), **options), 32, 3)[:, 8::16, 8::16]
    upright = {
        1: [10, 90, 170, 250],
        2: [90, 10, 250, 170],
        3: [250, 170, 90, 10],
        4: [170, 250, 10, 90],
        5: [10, 170, 90, 250],
        6: [170, 10, 250, 90],
        7: [250, 90, 170, 10],
        8: [90, 250, 10, 170],
    }[orientation]
    assert np.abs(decoded.reshape(3, 4).astype(int) - upright).max() <= 3


def test_cmyk(either: str) -> None:
    """Red, green, blue and white ink on paper, as printers' JPEGs have them."""
    inks = {(0, 255, 255, 0): (255, 0, 0), (255, 0, 255, 0): (0, 255, 0), (255, 255, 0, 0): (0, 0, 255)}
    for ink, colour in inks.items():
        data = encode(Image.new("CMYK", (16, 16), ink), "JPEG", quality=100)
        decoded = decode(data, 16, 3).astype(int)
        assert np.abs(decoded - np.reshape(colour, (3, 1, 1))).max() <= 4
    assert (decode(encode(Image.new("CMYK", (16, 16)), "JPEG"), 16, 1) >= 252).all()


def npy(array: np.ndarray, **options: bool) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def test_arrays() -> None:
    for array in (RAMP, RAMP[:, :, None], RAMP[None], RAMP / 255, (RAMP / 255).astype(">f4")):
        assert (decode(npy(array), 8, 1)[0] == RAMP).all()
        assert (decode(npy(array), 8, 3) == RAMP).all()
    for array in (COLOUR, COLOUR.transpose(2, 0, 1), np.asfortranarray(COLOUR)):
        assert (decode(npy(array), 8, 3) == COLOUR.transpose(2, 0, 1)).all()
    luma = COLOUR @ np.array([0.299, 0.587, 0.114])
    assert np.abs(decode(npy(COLOUR), 8, 1)[0] - luma).max() <= 1
    with pytest.raises(WrongSizeError):
        decode(npy(RAMP), 16, 1)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (npy(np.array([[print]], object), allow_pickle=True), "of object"),
        (npy(RAMP.astype(np.int32)), "of int32"),
        (npy(np.zeros((8, 8), "U4")), "of <U4"),
        (npy(RAMP.astype(np.float32)), "not 0 to 1"),
        (npy(np.full((8, 8), np.nan)), "not 0 to 1"),
        (npy(np.zeros((8, 8, 4), np.uint8)), "shape"),
        (npy(np.zeros(64, np.uint8)), "shape"),
        (npy(RAMP)[:-1], "bytes of numbers"),
        (npy(RAMP) + b"x", "bytes of numbers"),
        (npy(RAMP)[:20], "EOF"),
    ],
)
def test_arrays_that_are_no_images(data: bytes, problem: str) -> None:
    with pytest.raises(BadImageError, match=problem):
        decode(data, 8, 1)


def test_an_array_that_claims_to_be_huge() -> None:
    """Its size is known from the header; nothing of that size is made."""
    header = repr({"descr": "|u1", "fortran_order": False, "shape": (1 << 20, 1 << 20)}).encode()
    data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    with pytest.raises(WrongSizeError):
        decode(data, 8, 1)
    with pytest.raises(BadImageError, match="bytes of numbers"):
        decode(data, 1 << 20, 1)


def chunk(name: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")


def filtered_png(pixels: np.ndarray, filters: list[int], *pieces: int) -> bytes:
    """A PNG of uint8 [h, w] or [h, w, 3] whose rows have the filters wanted (PNG specification, section 9),
    its compressed pixels cut at `pieces`."""
    height, width, channels = np.atleast_3d(pixels).shape
    rows = pixels.reshape(height, -1).astype(int)
    left = np.pad(rows, ((0, 0), (channels, 0)))[:, : rows.shape[1]]
    up = np.pad(rows, ((1, 0), (0, 0)))[:height]
    corner = np.pad(left, ((1, 0), (0, 0)))[:height]
    to_left, to_up, to_corner = abs(up - corner), abs(left - corner), abs(left + up - 2 * corner)
    nearest = np.where(to_up <= to_corner, up, corner)
    paeth = np.where((to_left <= to_up) & (to_left <= to_corner), left, nearest)
    predicted = [np.zeros_like(rows), left, up, (left + up) // 2, paeth]
    data = zlib.compress(
        b"".join(bytes([f, *((rows[y] - predicted[f][y]) % 256).tolist()]) for y, f in enumerate(filters))
    )
    ends = [0, *pieces, len(data)]
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2 * (channels == 3), 0, 0, 0])
    parts = [chunk(b"IDAT", data[a:b]) for a, b in pairwise(ends)]
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(parts) + chunk(b"IEND", b"")


def by_pillow(data: bytes) -> np.ndarray | None:
    """What Pillow makes of a file on its own; None if it refuses."""
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            return np.asarray(image)
    except (OSError, SyntaxError, ValueError):
        return None


def test_plain_pngs_come_out_as_pillow_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every filter alone and all of them mixed, at odd sizes, and never through Pillow's own reading."""
    rng, slow = np.random.default_rng(0), decoding._pillow
    monkeypatch.setattr(decoding, "_pillow", None)
    for size in (1, 2, 3, 5, 7, 13, 28, 65):
        for filters in (*([f] * size for f in range(5)), rng.integers(0, 5, size).tolist()):
            for pixels in (noise(size, size, 3), noise(size, size), np.zeros((size, size), np.uint8)):
                data = filtered_png(pixels, filters)
                assert (by_pillow(data) == pixels).all()
                for channels in (1, 3):
                    expected = slow(data, size, channels).reshape(size, size, channels).transpose(2, 0, 1)
                    assert (decode(data, size, channels) == expected).all()
                    assert (decode(encode(Image.fromarray(pixels)), size, channels) == expected).all()
    with pytest.raises(WrongSizeError):
        decode(data, 64, 1)


def test_pngs_with_more_in_them_are_pillows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several pieces of pixels, a transparent colour, a gamma, interlacing: right, by the other way."""
    pixels, asked = noise(9, 9), []
    slow = decoding._pillow
    monkeypatch.setattr(decoding, "_pillow", lambda *a: asked.append(1) or slow(*a))
    plain = filtered_png(pixels, [1] * 9)
    gamma = plain[:33] + chunk(b"gAMA", bytes(4)) + plain[33:]
    behind = plain[:-12] + chunk(b"tEXt", b"a\0b") + plain[-12:]
    for data in (filtered_png(pixels, [4] * 9, 20, 50), gamma, behind):
        assert (decode(data, 9, 1)[0] == pixels).all()
    clear = encode(Image.fromarray(pixels), transparency=int(pixels[0, 0]))
    assert (decode(clear, 9, 1)[0][pixels == pixels[0, 0]] == 255).all()
    assert len(asked) == 4


def test_damaged_pngs_are_what_pillow_takes_them_for() -> None:
    """Every cut, and every bit of the file turned over: the same pixels, or refused by both."""
    pixels = noise(6, 6)
    whole = filtered_png(pixels, [0, 1, 2, 3, 4, 1])
    flipped = [bytearray(whole) for _ in range(8 * len(whole))]
    for bit, data in enumerate(flipped):
        data[bit // 8] ^= 1 << bit % 8
    refused = 0
    for data in (*(whole[:cut] for cut in range(len(whole))), *map(bytes, flipped)):
        expected = by_pillow(data)
        if expected is not None and expected.shape == (6, 6):
            assert (decode(data, 6, 1)[0] == expected).all()
        else:
            refused += 1
            with pytest.raises((BadImageError, WrongSizeError)):
                decode(data, 6, 1)
    assert refused > 500


def test_a_png_that_holds_more_than_it_says() -> None:
    """Rows behind the last one, 100 MB of them in 100 kB, are never unpacked."""
    data = zlib.compress(bytes(100_000_000))
    header = chunk(b"IHDR", (8).to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0]))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    assert not decode(bomb, 8, 1).any()
