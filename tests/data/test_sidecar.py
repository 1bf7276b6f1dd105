"""Sidecars, what a scan found of a shard: all of it comes back, and one that is damaged or lies does not."""

from __future__ import annotations

import random
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scans import content, scan_bytes
from tiny_shards import image_of, write_tar

from pipeline.data.sidecar import load, save, scan

PNG = image_of(0, 0)


def test_sidecars_keep_what_was_passed_over(tmp_path: Path) -> None:
    members = [("a.json", b""), ("README", b""), ("b.png", PNG), ("b.jpg", PNG), ("c.photo.png", PNG)]
    table = scan(write_tar(tmp_path / "x.tar", members), "x.tar")
    save(table, tmp_path / "x.npz")
    again = load(tmp_path / "x.npz")
    assert again is not None and again.extensions == table.extensions
    for kind in ("without_image", "unusable", "strays"):
        assert getattr(again, kind) == getattr(table, kind) and getattr(again, kind).count == 1


@pytest.mark.parametrize(
    "extra",
    [
        "[]",
        "{",
        '[[], [1, ["\\u001b[2J"]], [0, []], [0, []]]',
        "[[], [-1, []], [0, []], [0, []]]",
        '[[], [0, ["a"]], [0, []], [0, []]]',
        "[[], [1000000000, []], [0, []], [0, []]]",
        '[["exe"], [0, []], [0, []], [0, []]]',
        "[[5], [0, []], [0, []], [0, []]]",
        "[" * 100_000,
    ],
)
def test_a_sidecar_that_lies_about_what_was_passed_over(tmp_path: Path, shard: bytes, extra: str) -> None:
    save(scan_bytes(tmp_path, shard), tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz") as file:
        columns = dict(file)
    np.savez(tmp_path / "x.npz", **columns, passed_over=np.frombuffer(extra.encode(), np.uint8))
    assert load(tmp_path / "x.npz") is None


def test_sidecars_of_shards_without_anything_odd_are_as_they_were(tmp_path: Path, shard: bytes) -> None:
    save(scan_bytes(tmp_path, shard), tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz") as file:
        assert set(file) == {
            *("version", "filesize", "sha256", "names", "name_ends"),
            *("offset", "size", "extension", "label", "crc"),
        }
        assert int(file["version"]) == 1 and file["extension"].dtype == np.uint8


def test_sidecar_comes_back_and_a_damaged_one_does_not(tmp_path: Path, shard: bytes) -> None:
    table = scan_bytes(tmp_path, shard)
    save(table, tmp_path / "deep" / "x.npz")
    again = load(tmp_path / "deep" / "x.npz")
    assert again is not None
    assert content(again, shard) == content(table, shard)
    assert (again.crc == table.crc).all() and again.sha256 == table.sha256
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["x.npz"], "nothing temporary is left"
    data = (tmp_path / "deep" / "x.npz").read_bytes()
    rng = random.Random(0)
    for _ in range(100):
        (tmp_path / "bad.npz").write_bytes(data[: rng.randrange(len(data))])
        assert load(tmp_path / "bad.npz") is None
    assert load(tmp_path / "none.npz") is None


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("offset", 10**9),
        ("offset", 2**63 - 1),
        ("offset", -1),
        ("size", 10**9),
        ("extension", 9),
        ("name_ends", 0),
    ],
)
def test_a_sidecar_that_points_elsewhere_is_not_believed(
    tmp_path: Path, shard: bytes, column: str, value: int
) -> None:
    table = scan_bytes(tmp_path, shard)
    getattr(table, column)[-1] = value
    save(table, tmp_path / "x.npz")
    assert load(tmp_path / "x.npz") is None


@pytest.mark.parametrize("names", [b"\xff", "\u00fc".encode()[:1], b"\xed\xa0\x80"])
def test_a_sidecar_whose_keys_are_no_text_is_not_believed(tmp_path: Path, shard: bytes, names: bytes) -> None:
    table = scan_bytes(tmp_path, shard)
    save(replace(table, names=names + table.names[len(names) :]), tmp_path / "x.npz")
    assert load(tmp_path / "x.npz") is None


def test_a_sidecar_whose_keys_end_in_the_middle_of_a_letter(tmp_path: Path) -> None:
    members = [("\u00fc1.png", PNG), ("\u00fc2.png", PNG)]
    table = scan(write_tar(tmp_path / "x.tar", members, tarfile.PAX_FORMAT), "x.tar")
    save(table, tmp_path / "x.npz")
    assert load(tmp_path / "x.npz") is not None
    table.name_ends[0] += 1
    save(table, tmp_path / "x.npz")
    assert load(tmp_path / "x.npz") is None


@pytest.mark.parametrize("filesize", [-1, 2**63, 2**64, np.inf])
def test_a_sidecar_of_a_file_of_no_size(tmp_path: Path, shard: bytes, filesize: float) -> None:
    save(scan_bytes(tmp_path, shard), tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz") as file:
        columns = dict(file) | {"filesize": np.array(filesize, object if filesize == 2**64 else None)}
    np.savez(tmp_path / "x.npz", **columns)
    assert load(tmp_path / "x.npz") is None
