"""Images that are there more than once, as `shardgan prepare` counts them and leaves them out."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from launch.prepare import prepare as command
from pipeline.data.index import load_index
from pipeline.data.prepare.writer import Options, prepare


@pytest.fixture
def doubled(pictures: Path) -> Path:
    """The 12 pictures, of which 3 are there again: as a copy, as a BMP, and in the other class."""
    shutil.copy(pictures / "cats" / "0.png", pictures / "cats" / "again.png")
    Image.open(pictures / "cats" / "1.png").save(pictures / "cats" / "z.bmp")
    shutil.copy(pictures / "cats" / "2.png", pictures / "dogs" / "no dog.png")
    (pictures / "cats" / "broken.png").write_bytes(b"no image")
    (pictures / "dogs" / "broken.png").write_bytes(b"no image")
    return pictures


@pytest.mark.parametrize("workers", [1, 2])
def test_copies_are_left_out(doubled: Path, tmp_path: Path, workers: int) -> None:
    options = Options(size=8, per_shard=5, dedupe=True)
    index = prepare(str(doubled), str(tmp_path / "out"), options, workers=workers)
    assert index.num_samples == 12 and index.classes == ("cats", "dogs")
    lines = (tmp_path / "out" / "sources.txt").read_text().splitlines()
    kept = sorted(line.split("\t")[1] for line in lines)
    assert kept == sorted([*(f"cats/{n}.png" for n in range(7)), *(f"dogs/{n}.png" for n in range(5))])
    assert sorted((tmp_path / "out" / "skipped.txt").read_text().splitlines())[:2] == [
        "pictures/cats/again.png: a copy of cats/0.png",
        "pictures/cats/broken.png: not a PNG, JPEG, WEBP, BMP, GIF, TIFF, PPM, JPEG2000, AVIF or .npy image",
    ]
    assert "pictures/dogs/no dog.png: a copy of cats/2.png" in (tmp_path / "out" / "skipped.txt").read_text()


def test_shards_without_copies_are_the_same_bytes(doubled: Path, pictures: Path, tmp_path: Path) -> None:
    prepare(str(doubled), str(tmp_path / "one"), Options(size=8, dedupe=True), workers=1)
    for name in ("cats/again.png", "cats/z.bmp", "dogs/no dog.png"):
        (pictures / name).unlink()
    index = prepare(str(pictures), str(tmp_path / "two"), Options(size=8, dedupe=True), workers=1)
    for shard in index.shards:
        assert (tmp_path / "one" / shard.url).read_bytes() == (tmp_path / "two" / shard.url).read_bytes()


def test_copies_are_counted(doubled: Path, tmp_path: Path) -> None:
    said = CliRunner().invoke(command, [str(doubled), str(tmp_path / "a"), "--size", "8"]).output
    assert "  3 images are copies of another one: --dedupe leaves them out\n" in said
    said = CliRunner().invoke(command, [str(doubled), str(tmp_path / "b"), "--size", "8", "--dedupe"]).output
    assert "--dedupe leaves" not in said and "left out: 5 (copies 3, unreadable 2), listed in" in said


def test_other_images_of_the_same_crc_and_size_are_no_copies(tmp_path: Path) -> None:
    (tmp_path / "noise").mkdir()
    numbers = np.random.default_rng(0)
    for number in range(1500):
        pixels = numbers.integers(0, 256, (8, 8), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "noise" / f"{number}.png")
    out = tmp_path / "out"
    said = CliRunner().invoke(command, [str(tmp_path / "noise"), str(out), "--workers", "1"]).output
    index = load_index(str(out))
    tables = [index.table(shard) for shard in range(2)]
    alike = {(crc, size) for table in tables for crc, size in zip(table.crc, table.size, strict=True)}
    assert len(alike) < 1500, "else this shows nothing"
    assert "1,500 images" in said and "copies" not in said
