"""`shardgan prepare` converts colours of another profile to sRGB."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import webdataset
from numpy.typing import NDArray
from PIL import Image, ImageCms

from pipeline.data.prepare.writer import Options, prepare

# Red, green and blue of Display P3 (here with a gamma of 2.2), and of sRGB, as XYZ under white D50.
_P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
_SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
_GAMMA = 2.2


def _profile() -> bytes:
    """An ICC profile, version 2, of three primaries and a gamma (ICC.1:2001-04, sections 6.1 to 6.5)."""

    def fixed(values: NDArray[np.float64]) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(_GAMMA * 256)) + b"\0\0"
    text = b"P3\0"
    name = b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(79)
    tags = {
        b"desc": name,
        b"cprt": b"text\0\0\0\0none\0",
        b"wtpt": fixed(np.array([0.9642, 1.0, 0.8249])),
        **{c + b"XYZ": fixed(_P3[:, i]) for i, c in enumerate((b"r", b"g", b"b"))},
        **{c + b"TRC": curve for c in (b"r", b"g", b"b")},
    }
    table, body, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for tag, data in tags.items():
        table += tag + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(">I4sI4s4s4s", start + len(body), bytes(4), 0x02100000, b"mntr", b"RGB ", b"XYZ ")
    head += bytes(12) + b"acsp" + bytes(28) + struct.pack(">iii", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + table + body


def _as_srgb(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """What Display P3's numbers are in sRGB: linear light, from one set of primaries to the other."""
    linear = (pixels / 255) ** _GAMMA @ (np.linalg.inv(_SRGB) @ _P3).T
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def _made(picture: Image.Image, tmp_path: Path, profile: bytes | None) -> NDArray[np.uint8]:
    source = tmp_path / "source"
    source.mkdir()
    picture.save(source / "a.png", icc_profile=profile)
    prepare(str(source), str(tmp_path / "out"), Options(size=16), workers=1)
    (sample,) = webdataset.WebDataset(str(tmp_path / "out" / "shard-000000.tar"), shardshuffle=False).decode(
        "pil"
    )
    return np.asarray(sample["png"])


@pytest.fixture
def pixels() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(20, 236, (16, 16, 3), dtype=np.uint8)


def test_wide_colours_become_those_of_srgb(pixels: NDArray[np.uint8], tmp_path: Path) -> None:
    made = _made(Image.fromarray(pixels), tmp_path, _profile())
    assert abs(made - _as_srgb(pixels)).max() <= 2
    assert abs(made.astype(int) - pixels).max() > 20, "the profile is another than sRGB's"


def test_profiles_of_srgb_and_damaged_ones_change_nothing(pixels: NDArray[np.uint8], tmp_path: Path) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for number, profile in enumerate([srgb, b"no profile", _profile()[:200]]):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert (_made(Image.fromarray(pixels), folder, profile) == pixels).all()


def test_transparency_is_kept(pixels: NDArray[np.uint8], tmp_path: Path) -> None:
    """The background is not converted: it is sRGB's already."""
    alpha = np.concatenate([pixels, np.full((16, 16, 1), 255, np.uint8)], axis=2)
    alpha[:8, :, 3] = 0
    (tmp_path / "alpha").mkdir()
    made = _made(Image.fromarray(alpha), tmp_path / "alpha", _profile())
    assert (made[:8] == 255).all() and abs(made[8:] - _as_srgb(pixels)[8:]).max() <= 2
