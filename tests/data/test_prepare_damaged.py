"""`shardgan prepare` on zips and names that are damaged: one image is left out, the others are kept."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from tiny_shards import png

from launch.prepare import prepare as command
from pipeline.config import UserError
from pipeline.data.prepare.writer import Options, prepare

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 40), np.uint8)
WAYS = [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2]


@pytest.mark.parametrize("way", WAYS)
def test_a_damaged_stream_in_a_zip(tmp_path: Path, way: int) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", way) as file:
        for i in range(6):
            file.writestr(f"{i}.png", png(PIXELS))
    with zipfile.ZipFile(path) as file:
        start = file.infolist()[3].header_offset
        size = file.infolist()[3].compress_size
    whole = path.read_bytes()
    for at in (35, 45, 60, size // 2):
        data = bytearray(whole)
        data[start + at : start + at + 20] = bytes(255 - b for b in data[start + at : start + at + 20])
        path.write_bytes(data)
        out = tmp_path / f"out-{at}"
        assert prepare(str(path), str(out), Options(size=8), workers=1).num_samples == 5
        assert "3.png in" in (out / "skipped.txt").read_text()


def test_a_zip_of_another_version(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("0.png", png(PIXELS))
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\x01\x02")
    data[at + 6] = 99
    path.write_bytes(data)
    with pytest.raises(UserError, match="neither a folder nor a zip"):
        prepare(str(path), str(tmp_path / "out"), Options(size=8), workers=1)


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    """Of a folder that is made, of one that is read, and of a file that is left out."""
    folder, out = (os.fsencode(tmp_path) + name for name in (b"/in-\xfc", b"/out-\xfc"))
    os.mkdir(folder)  # noqa: PTH102
    for name, data in [(b"good-\xfc.png", png(PIXELS)), (b"bad-\xfc.png", b"no image")]:
        Path(os.fsdecode(folder + b"/" + name)).write_bytes(data)
    run = CliRunner().invoke(command, [os.fsdecode(folder), os.fsdecode(out), "--size", "8"])
    assert run.exit_code == 0, run.exception
    assert "1 image could not be read" in run.output and "bad-\\udcfc.png: not a" in run.output
    skipped = Path(os.fsdecode(out)) / "skipped.txt"
    assert "/bad-\\udcfc.png: not a" in skipped.read_text("ascii")
    said: list[str] = []
    prepare(os.fsdecode(folder), os.fsdecode(out), Options(size=8), announce=said.append)
    assert "made by the same command" in said[0]
