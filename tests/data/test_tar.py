"""The strict walk: whatever is wrong with a tar is said, with the shard's name and the byte."""

from __future__ import annotations

import gzip
import io
import random
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_shards import image_of, members_of, write_tar

from pipeline.config import UserError
from pipeline.data.sidecar import Table, load, save, scan

PNG = image_of(0, 0)


def scan_bytes(folder: Path, data: bytes) -> Table:
    path = folder / "x.tar"
    path.write_bytes(data)
    return scan(path, "x.tar")


def content(table: Table, data: bytes) -> list[tuple[str, bytes, int]]:
    images = [data[o : o + n] for o, n in zip(table.offset.tolist(), table.size.tolist(), strict=True)]
    return [(table.key(row), images[row], int(table.label[row])) for row in range(len(table))]


@pytest.fixture
def shard(tmp_path: Path) -> bytes:
    return write_tar(tmp_path / "good.tar", members_of(3, 12, classes=5)).read_bytes()


def test_walk_agrees_with_tarfile(tmp_path: Path, shard: bytes) -> None:
    table = scan_bytes(tmp_path, shard)
    assert content(table, shard) == [(f"3-{row}", image_of(3, row), (3 + row) % 5) for row in range(12)]
    with tarfile.open(tmp_path / "x.tar") as tar:
        assert table.offset.tolist() == [m.offset_data for m in tar if m.name.endswith("png")]


def test_every_truncation_is_noticed_or_loses_nothing(tmp_path: Path, shard: bytes) -> None:
    whole = content(scan_bytes(tmp_path, shard), shard)
    end = len(shard.rstrip(b"\0"))  # what follows is padding and zeros
    rng = random.Random(0)
    cuts = set(range(0, len(shard), 512)) | {rng.randrange(len(shard)) for _ in range(200)}
    harmless = 0
    for cut in sorted(cuts):
        try:
            table = scan_bytes(tmp_path, shard[:cut])
        except UserError as error:
            assert "shard x.tar, byte " in str(error)
            assert "empty" in str(error) if cut == 0 else "truncated" in str(error)
        else:
            assert cut >= end + 1024 and content(table, shard) == whole
            harmless += 1
    assert 0 < harmless < 20, "only cuts in the zeros after the end-of-archive mark are harmless"


def test_flipped_bits_in_headers_are_noticed_or_change_nothing(tmp_path: Path, shard: bytes) -> None:
    whole = content(scan_bytes(tmp_path, shard), shard)
    with tarfile.open(tmp_path / "x.tar") as tar:
        headers = [member.offset for member in tar]
    rng = random.Random(1)
    noticed = 0
    for _ in range(300):
        damaged = bytearray(shard)
        damaged[rng.choice(headers) + rng.randrange(512)] ^= 1 << rng.randrange(8)
        try:
            table = scan_bytes(tmp_path, bytes(damaged))
        except UserError:
            noticed += 1
        else:  # the checksum field's own trailing blanks
            assert content(table, bytes(damaged)) == whole
    assert noticed > 280


def test_zeroed_blocks_outside_the_images_are_noticed(tmp_path: Path, shard: bytes) -> None:
    with tarfile.open(tmp_path / "good.tar") as tar:
        headers = [member.offset for member in tar]
    for start in headers:
        with pytest.raises(UserError, match=r"shard x\.tar, byte \d+"):
            scan_bytes(tmp_path, shard[:start] + bytes(512) + shard[start + 512 :])
        with pytest.raises(UserError, match=r"shard x\.tar, byte \d+"):
            scan_bytes(tmp_path, shard[:start] + bytes(1024) + shard[start + 1024 :])


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.png", PNG), ("a.png", PNG)], "byte 1024: 'a.png' is there twice"),
        ([("a.png", PNG), ("b.png", PNG), ("a.cls", b"1")], "byte 2048: sample 'a' is there twice"),
        ([("a.png", PNG), ("b.cls", b"1")], "byte 1024: sample 'b' has no image .* only cls"),
        ([("b.cls", b"1"), ("b.json", b"{}"), ("c.png", PNG)], "byte 0: sample 'b' has no image"),
        ([("a.png", PNG), ("a.jpg", PNG)], "byte 1024: sample 'a' has two images"),
        ([("a.png", PNG), ("a.cls", b"1000000")], "byte 1024: label 1000000"),
    ],
)
def test_samples_that_are_not(tmp_path: Path, members: list, message: str) -> None:
    path = write_tar(tmp_path / "x.tar", members)
    with pytest.raises(UserError, match=f"shard x.tar, {message}"):
        scan(path, "x.tar")


def test_files_that_are_not_tars(tmp_path: Path, shard: bytes) -> None:
    for data, message in [
        (b"", "an empty file"),
        (gzip.compress(shard), "compressed with gzip"),
        (b"<html>Not found</html>" * 100, "not a tar file"),
        (PNG * 20, "not a tar file"),
        (shard + shard, "something after the end"),
        (shard[: len(shard.rstrip(b"\0")) // 512 * 512 + 1024] + b"x" * 512, "two"),
    ]:
        with pytest.raises(UserError, match=rf"shard x\.tar, byte \d+: .*{message}"):
            scan_bytes(tmp_path, data)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("a.png")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(UserError, match="link or a device"):
        scan(path, "x.tar")


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_and_foreign_names(tmp_path: Path, format: int) -> None:
    keys = ["f/" + "ü" * 150 + str(i) for i in range(3)] + ["plain", "../../etc/x", "/etc/y"]
    path = write_tar(tmp_path / "x.tar", [(f"{key}.png", PNG) for key in keys], format)
    table = scan(path, "x.tar")
    assert [table.key(row) for row in range(len(table))] == keys
    assert sorted(tmp_path.iterdir()) == [path], "names never become paths"


def test_members_that_are_no_samples_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        folder = tarfile.TarInfo("some")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, data in [
            ("README", b"hello"),
            ("._a.png", b"mac"),
            ("some/a.png", PNG),
            ("some/a.txt", b""),
        ]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    table = scan(path, "x.tar")
    assert [table.key(row) for row in range(len(table))] == ["some/a"]


@pytest.mark.parametrize("label", [b"cat", b"", b"-1", b"1.5", b"9" * 5000])
def test_a_label_that_is_no_number_is_none(tmp_path: Path, label: bytes) -> None:
    table = scan(write_tar(tmp_path / "x.tar", [("a.cls", label), ("a.png", PNG)]), "x.tar")
    assert table.label.tolist() == [-1] and table.label_counts() == {}


def test_a_size_beyond_the_file_costs_no_memory(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.png")
    info.size = 2**60
    data = info.tobuf(tarfile.GNU_FORMAT) + PNG
    with pytest.raises(UserError, match="truncated"):
        scan_bytes(tmp_path, data)


def header(size: bytes, kind: bytes = b"0") -> bytes:
    """Of a member, its size written so, the checksum right."""
    info = tarfile.TarInfo("a.png")
    info.type = kind
    data = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    data[124:136] = size.ljust(12, b"\0")
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data)
    return bytes(data)


@pytest.mark.parametrize(
    "size", [b"-10", b"-1", b"-0", b"+5", b"1_0", b"0o17", b"8", b"1 2", b"1\0002", b"x"]
)
@pytest.mark.parametrize("kind", [b"0", b"L", b"x"])
def test_a_size_that_is_not_octal(tmp_path: Path, size: bytes, kind: bytes) -> None:
    data = header(size, kind) + bytes(512) + header(b"0") + bytes(1024)
    with pytest.raises(UserError, match=r"shard x\.tar, byte 0: damaged: the member's size is not a number"):
        scan_bytes(tmp_path, data)


@pytest.mark.parametrize("size", [b"12", b"00000000012", b" 12 ", b"    12\0", b"12\0 ", b" " * 12, b""])
def test_a_size_is_padded_with_blanks_and_zeros(tmp_path: Path, size: bytes) -> None:
    data = bytes(512) if size.strip() else b""
    assert scan_bytes(tmp_path, header(size) + data + bytes(1024)).size.tolist() == [10 if data else 0]


@pytest.mark.parametrize("size", [b"-10", b"1_0", b"0x1", "\u0663".encode(), b"9" * 20, b""])
def test_a_size_in_an_extended_header_that_is_none(tmp_path: Path, size: bytes) -> None:
    rest = b" size=" + size + b"\n"
    record = next(b"%d" % n + rest for n in range(99) if len(b"%d" % n + rest) == n)  # begins with its length
    extended = header(b"%o" % len(record), b"x") + record.ljust(512, b"\0")
    with pytest.raises(UserError, match=r"shard x\.tar, byte 0: damaged: the member's size is not a number"):
        scan_bytes(tmp_path, extended + header(b"0") + bytes(1024))


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
