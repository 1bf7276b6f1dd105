"""The strict walk: whatever is wrong with a tar is said, with the shard's name and the byte."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import random
import re
import tarfile
from pathlib import Path

import pytest
from scans import content, scan_bytes
from tiny_shards import image_of, write_tar

from pipeline.config import UserError
from pipeline.data.samples import MOST_REASONS, PassedOver
from pipeline.data.sidecar import scan

PNG = image_of(0, 0)


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
        zeroed = shard[:start] + bytes(1024) + shard[start + 1024 :]
        if start == headers[-1]:  # a tar that ends early and well: its last sample has a label, and no image
            assert scan_bytes(tmp_path, zeroed).without_image.count == 1
            continue
        with pytest.raises(UserError, match=r"shard x\.tar, byte \d+"):
            scan_bytes(tmp_path, zeroed)


@pytest.mark.parametrize(
    ("members", "kind", "reason"),
    [
        (
            [("a.cls", b"1"), ("a.json", b"{}")],
            "without_image",
            r"sample 'a' has no image .* only cls, json\.",
        ),
        ([("README.md", b"# faces")], "without_image", "sample 'README' has no image .* only md"),
        ([("a.", b"")], "without_image", r"sample 'a' has no image \(png, jpg, jpeg, webp, npy\)\.$"),
        ([("a.png", PNG), ("a.png", PNG)], "unusable", r"sample 'a' has 2 images \(png, png\)\."),
        ([("a.png", PNG), ("a.jpg", PNG)], "unusable", r"sample 'a' has 2 images \(png, jpg\)\."),
        ([("a.npy", PNG), ("a.npy", PNG)], "unusable", r"sample 'a' has 2 images \(npy, npy\)\."),
        (
            [(f"22.{n:02d}.png", PNG) for n in range(5)],
            "unusable",
            r"sample '22' has 5 images \(00.png, 01.png, 02.png, …\): a key ends at the first dot of",
        ),
        (
            [("a.input.png", PNG), ("a.target.png", PNG)],
            "unusable",
            r"sample 'a' has 2 images \(input.png, target.png\): a key ends at the first dot",
        ),
        (
            [("a.png", PNG), ("a.cls", b"1"), ("a.cls", b"2")],
            "unusable",
            r"sample 'a' has 2 labels \(\.cls\)",
        ),
        ([("a\x1b[2J.txt", PNG)], "without_image", r"sample 'a\\x1b\[2J' has no image"),
        ([("a" * 90 + ".txt", PNG)], "without_image", "sample '" + "a" * 60 + "…' has no image"),
    ],
)
@pytest.mark.parametrize("place", ["first", "between", "last"])
def test_one_odd_sample_is_passed_over(
    tmp_path: Path, members: list, kind: str, reason: str, place: str
) -> None:
    good = [[("x.png", image_of(0, 0)), ("x.cls", b"7")], [("y.png", image_of(0, 1))]]
    good.insert(("first", "between", "last").index(place), members)
    table = scan(write_tar(tmp_path / "x.tar", [m for part in good for m in part]), "x.tar")
    data = (tmp_path / "x.tar").read_bytes()
    assert content(table, data) == [("x", image_of(0, 0), 7), ("y", image_of(0, 1), -1)]
    passed = getattr(table, kind)
    assert passed.count == 1 and re.match(rf"shard x\.tar, byte \d+: {reason}", passed.reasons[0])
    others = {"without_image", "unusable", "strays"} - {kind}
    assert not any(getattr(table, other).count for other in others)


@pytest.mark.parametrize(
    ("members", "extension", "label"),
    [
        ([("a.input.png", PNG), ("a.output.txt", b"x")], "input.png", -1),
        ([("a.Image.PNG", PNG), ("a.cls", b"3")], "image.png", 3),
        ([("22.05.png", PNG), ("22.05.json", b"{}")], "05.png", -1),
        ([("22.05.png", PNG), ("22.05.cls", b"4")], "05.png", 4),
        ([("22.05.png", PNG), ("22.06.cls", b"4")], "05.png", -1),
        ([("22.05.cls", b"4"), ("22.05.png", PNG), ("22.cls", b"2")], "05.png", 2),
        ([("a.mask.png", b"mask"), ("a.edges.png", b"edges"), ("a.png", PNG)], "png", -1),
        ([("a.png", PNG), ("a.mask.npy", b"mask")], "png", -1),
        ([("a.emb.npy", b"embedding"), ("a.photo.png", PNG)], "photo.png", -1),
        ([("a.photo.npy", PNG)], "photo.npy", -1),
        ([("a.photo.jpg", b"photo"), ("a.npy", PNG)], "npy", -1),  # as it was, if there was one
        ([("a.png", PNG), ("a.cls", b"1"), ("a.cls", b" 1\n")], "png", 1),
        ([("a.png", PNG), ("a.txt", b""), ("a.txt", b"")], "png", -1),
        ([("a.png", PNG), ("b.txt", b""), ("a.cls", b"5")], "png", 5),
    ],
)
def test_which_member_is_the_image(tmp_path: Path, members: list, extension: str, label: int) -> None:
    table = scan(write_tar(tmp_path / "x.tar", members), "x.tar")
    data = (tmp_path / "x.tar").read_bytes()
    assert content(table, data) == [(members[0][0].partition(".")[0], PNG, label)]
    assert table.extensions[table.extension[0]] == extension


def test_a_list_of_reasons_is_short(tmp_path: Path) -> None:
    members = [(f"{row}.json", b"") for row in range(1000)] + [("a.png", PNG)]
    table = scan(write_tar(tmp_path / "x.tar", members), "x.tar")
    assert table.without_image.count == 1000 and len(table.without_image.reasons) == MOST_REASONS


def test_files_that_are_not_tars(tmp_path: Path, shard: bytes) -> None:
    for data, message in [
        (b"", "an empty file"),
        (gzip.compress(shard), "compressed with gzip"),
        (b"<html>Not found</html>" * 100, "not a tar file"),
        (bz2.compress(random.Random(0).randbytes(1000)), "compressed with bzip2"),
        (lzma.compress(random.Random(0).randbytes(1000)), "compressed with xz"),
        (b"\x28\xb5\x2f\xfd" + bytes(1000), "compressed with zstd"),
        (PNG * 20, "not a tar file"),
        (shard + shard, "something after the end"),
        (shard + bytes(2 << 20), "bytes of zeros from here on"),
        (shard[: len(shard.rstrip(b"\0")) // 512 * 512 + 1024] + b"x" * 512, "two"),
    ]:
        with pytest.raises(UserError, match=rf"shard x\.tar, byte \d+: .*{message}"):
            scan_bytes(tmp_path, data)


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (tarfile.SYMTYPE, "a link"),
        (tarfile.LNKTYPE, "a link"),
        (tarfile.CHRTYPE, "a device"),
        (tarfile.BLKTYPE, "a device"),
        (tarfile.FIFOTYPE, "a pipe"),
        (tarfile.GNUTYPE_SPARSE, "a sparse file"),
        (b"Z", "a file of an unknown kind"),
    ],
)
def test_links_and_devices_are_passed_over(tmp_path: Path, kind: bytes, what: str) -> None:
    """They are never followed, and the members behind them are read as ever."""
    path, data = tmp_path / "x.tar", PNG if kind in (tarfile.GNUTYPE_SPARSE, b"Z") else b""
    plain = [("b.png", image_of(0, 1)), ("c.png", image_of(0, 2)), ("c.txt", None)]
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, content_ in [("a.png", None), ("a.txt", b""), *plain]:
            info = tarfile.TarInfo(name)
            if content_ is None:
                info.type, info.linkname = kind, "/etc/passwd"
            info.size = len(data if content_ is None else content_)
            tar.addfile(info, io.BytesIO(data if content_ is None else content_))
    table = scan(path, "x.tar")
    assert content(table, path.read_bytes()) == [(f"{'bc'[i]}", image_of(0, i + 1), -1) for i in range(2)]
    assert table.unusable == PassedOver(
        1, (f"shard x.tar, byte 0: 'a.png' is {what}; shards hold plain files.",)
    )


def test_a_sparse_file_with_a_long_map(tmp_path: Path) -> None:
    """Its header goes on in further blocks, and its data follow those."""
    info = tarfile.TarInfo("a.png")
    info.type, info.size = tarfile.GNUTYPE_SPARSE, 700
    first = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    first[482] = 1
    first[148:156] = b" " * 8
    first[148:156] = b"%06o\0 " % sum(first)
    maps = bytes(504) + b"\1" + bytes(7) + bytes(512)
    rest = write_tar(tmp_path / "rest.tar", [("b.png", PNG)]).read_bytes()
    table = scan_bytes(tmp_path, bytes(first) + maps + b"x" * 700 + bytes(324) + rest)
    assert [table.key(row) for row in range(len(table))] == ["b"] and table.unusable.count == 1


def test_a_sparse_file_in_pax_headers(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, headers in [("GNUSparseFile.0/a.png", {"GNU.sparse.name": "a.png"}), ("b.png", {})]:
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = len(PNG), headers
            tar.addfile(info, io.BytesIO(PNG))
    table = scan(path, "x.tar")
    assert [table.key(row) for row in range(len(table))] == ["b"]
    assert "'a.png' is a sparse file" in table.unusable.reasons[0]


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
    assert table.strays.count == 2 and "'README' belongs to no sample" in table.strays.reasons[0]


@pytest.mark.parametrize(
    "label", [b"cat", b"", b"-1", b"1.5", b"3.0", b"1000000", b"9" * 5000, b"1 2", b"\xef\xbb\xbf3", b"\xb2"]
)
def test_a_label_that_is_no_number_is_none(tmp_path: Path, label: bytes) -> None:
    table = scan(write_tar(tmp_path / "x.tar", [("a.cls", label), ("a.png", PNG)]), "x.tar")
    assert table.label.tolist() == [-1] and table.label_counts() == {}


@pytest.mark.parametrize("label", [b"3", b"3\n", b" 3 \r\n", b"003"])
def test_a_label_is_a_whole_number(tmp_path: Path, label: bytes) -> None:
    table = scan(write_tar(tmp_path / "x.tar", [("a.CLS", label), ("a.png", PNG)]), "x.tar")
    assert table.label.tolist() == [3]


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


def test_an_extended_header_of_many_records(tmp_path: Path) -> None:
    """Of nearly the largest size, with records as short as may be: the last counts too."""
    path = tmp_path / "many.tar"
    records = b"4 =\n" * ((1 << 18) - 4) + b"14 path=z.png\n"
    data = header(b"%o" % len(records), b"x") + records.ljust(1 << 20, b"\0") + header(b"%o" % len(PNG))
    path.write_bytes(data + PNG.ljust(-(-len(PNG) // 512) * 512, b"\0") + bytes(1024))
    table = scan(path, "many.tar")
    assert [table.key(row) for row in range(len(table))] == ["z"]


@pytest.mark.parametrize("records", [b"4 =\n4 =", b"4=\n ", b" 4 =\n", b"000000004 =\n", b"0 =\n", b"x"])
def test_an_extended_header_that_cannot_be_read(tmp_path: Path, records: bytes) -> None:
    data = header(b"%o" % len(records), b"x") + records.ljust(512, b"\0") + header(b"0") + bytes(1024)
    with pytest.raises(UserError, match="an extended header that cannot be read"):
        scan_bytes(tmp_path, data)
