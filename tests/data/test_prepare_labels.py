"""Which class an image is of: neither made up nor lost, whatever the shape of the source."""

from __future__ import annotations

import json
import stat
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from tiny_shards import MakeShards, png, write_tar

from pipeline.config import UserError
from pipeline.data.prepare.known import KNOWN
from pipeline.data.prepare.source import Arrays
from pipeline.data.prepare.summary import Summary
from pipeline.data.prepare.writer import Options, prepare

IMAGE = png(np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8))
BAGS = [f"{n // 10:05d}/img{n:08d}.png" for n in range(40)]


def write(place: Path, files: Iterable[tuple[str, bytes]]) -> Path:
    """A zip or, by its name, a folder of files."""
    if place.suffix != ".zip":
        for name, data in files:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(data)
        return place
    with zipfile.ZipFile(place, "w") as file:
        for name, data in files:
            info = zipfile.ZipInfo("x")
            info.filename = name  # as it is, backslashes and all
            file.writestr(info, data)
    return place


def stylegan(labels: object, folder: str = "") -> list[tuple[str, bytes]]:
    described = json.dumps({"labels": labels}).encode()
    return [*((folder + name, IMAGE) for name in BAGS), (f"{folder}dataset.json", described)]


def prepared(source: Path, **options: object) -> tuple[Summary, list[str], dict[str, int]]:
    """What is said at the end, and at the start, and the label of each file."""
    out, said, summaries = source.with_name("out"), list[str](), list[Summary]()
    chosen = Options(**options)  # type: ignore[arg-type]
    prepare(str(source), str(out), chosen, workers=1, announce=said.append, report=summaries.append)
    labels, origins = {}, (out / "sources.txt").read_text().splitlines()
    files = dict(line.split("\t") for line in origins)
    with tarfile.open(out / "shard-000000.tar") as tar:
        for member in tar:
            if member.name.endswith(".cls"):
                labels[files[member.name[:-4]]] = int(tar.extractfile(member).read())  # type: ignore[union-attr]
    return summaries[0], said, labels


@pytest.mark.parametrize("place", ["x.zip", "x"])
@pytest.mark.parametrize("folder", ["", "wrap/"])
@pytest.mark.parametrize("separator", ["/", "\\"])
def test_labels_of_dataset_json(tmp_path: Path, place: str, folder: str, separator: str) -> None:
    """As StyleGAN's dataset_tool writes them: folders are bags of any images, the labels are listed."""
    labels = [[name.replace("/", separator), n % 7] for n, name in enumerate(BAGS)]
    summary, said, found = prepared(write(tmp_path / place, stylegan(labels, folder)))
    assert found == {folder + name: n % 7 for n, name in enumerate(BAGS)}
    assert summary.index.classes == tuple("0123456") and not said
    lines = list(summary.lines())
    assert "classes, from dataset.json: numbers, of 5 to 6 images each" in lines
    assert not summary.left_out and not (tmp_path / "out" / "skipped.txt").exists()


def test_dataset_json_without_labels(tmp_path: Path) -> None:
    """Its bags are no classes either."""
    summary, _, found = prepared(write(tmp_path / "x.zip", stylegan(None)))
    assert summary.index.num_classes == 0 and not found
    assert "dataset.json says that there are no labels" in summary.lines()


def test_files_that_dataset_json_does_not_list(tmp_path: Path) -> None:
    labels = [[name, n % 4] for n, name in enumerate(BAGS[:30])] + [["gone.png", 1], ["also.png", 2]]
    summary, said, found = prepared(write(tmp_path / "x.zip", stylegan([*labels, [BAGS[30], None]])))
    assert found == {name: n % 4 for n, name in enumerate(BAGS[:30])}
    assert said == [f"warning: 10 images without a label in dataset.json, the first {BAGS[30]}"]
    assert "2 files that dataset.json lists are not among the images" in summary.lines()


def test_a_file_that_dataset_json_lists_with_two_labels(tmp_path: Path) -> None:
    twice = [[name, 1] for name in (*BAGS, BAGS[3])]
    assert set(prepared(write(tmp_path / "x.zip", stylegan(twice)))[2].values()) == {1}
    with pytest.raises(UserError, match=f"dataset.json of .*: {BAGS[3]} is there with two labels"):
        prepared(write(tmp_path / "y.zip", stylegan([*twice, [BAGS[3], 2]])))


def test_labels_far_apart_are_numbered_anew(tmp_path: Path) -> None:
    """A million classes of which four have images would be no use; in shards as well."""
    numbers = [7, 20_000, 999_999, 31]
    summary, _, found = prepared(
        write(tmp_path / "x.zip", stylegan([[name, numbers[n % 4]] for n, name in enumerate(BAGS)]))
    )
    assert found == {name: [0, 2, 3, 1][n % 4] for n, name in enumerate(BAGS)}
    assert summary.index.classes == ("7", "31", "20000", "999999")
    assert any("labels up to 999,999, but only 4 of them occur" in line for line in summary.lines())
    members = [
        (f"{n}.{end}", data)
        for n in range(8)
        for end, data in (("png", IMAGE), ("cls", b"%d" % numbers[n % 4]))
    ]
    members += [("8.png", IMAGE)]
    write_tar(tmp_path / "y" / "ids" / "s.tar", members)
    summary, _, found = prepared(tmp_path / "y" / "ids")
    assert found == {f"s.tar/{n}": [0, 2, 3, 1][n % 4] for n in range(8)}
    assert summary.index.classes == ("7", "31", "20000", "999999")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"labels": [', "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ('{"labels": 3}', "not a list of"),
        ('{"labels": [3]}', "not a list of"),
        ('{"labels": [["00000/img00000000.png", [0.1, 0.9]]]}', "is no number of a class"),
        ('{"labels": [["00000/img00000000.png", 1.0]]}', "is no number of a class"),
        ('{"labels": [["00000/img00000000.png", true]]}', "is no number of a class"),
        ('{"labels": [["00000/img00000000.png", -1]]}', "is no number of a class"),
        ('{"labels": [["00000/img00000000.png", "0"]]}', "is no number of a class .*: '0'"),
        ('{"labels": [["00000/img00000000.png", 1000000]]}', "is no number of a class"),
        ('{"labels": [["elsewhere.png", 1]]}', "a label for none of its images"),
        ('{"labels": []}', "a label for none of its images"),
    ],
)
@pytest.mark.parametrize("place", ["x.zip", "x"])
def test_labels_that_cannot_be_used(tmp_path: Path, text: str, message: str, place: str) -> None:
    """Refused in one line, which says how to go on without them."""
    source = write(tmp_path / place, [*((name, IMAGE) for name in BAGS), ("dataset.json", text.encode())])
    with pytest.raises(UserError, match=message) as refused:
        prepare(str(source), str(tmp_path / "out"), Options(), workers=1)
    assert "--classes none" in str(refused.value) and "\n" not in str(refused.value)
    summary, _, found = prepared(source, classes="none")
    assert summary.index.num_samples == 40 and not found and summary.images.tables == ["dataset.json"]


def test_a_dataset_json_of_something_else(tmp_path: Path) -> None:
    """It is said that nobody reads it, and which folders are taken for classes though they may be none."""
    files = [*((name, IMAGE) for name in BAGS), ("dataset.json", b'{"images": []}')]
    summary, said, found = prepared(write(tmp_path / "x.zip", files))
    assert set(found.values()) == {0, 1, 2, 3} and summary.index.classes[3] == "00003"
    assert "not read: dataset.json" in "".join(summary.lines())
    assert len(said) == 1 and said[0].startswith("warning: the folders 00000, 00001, 00002, … are numbered")


def test_separators_of_windows(tmp_path: Path) -> None:
    names = ["photos\\cat\\1.png", "photos\\dog\\a\\2.png", "photos\\dog/3.png", "photos\\bird\\"]
    summary, said, found = prepared(write(tmp_path / "x.zip", [(n, IMAGE * (n[-1] != "\\")) for n in names]))
    assert found == {"photos/cat/1.png": 0, "photos/dog/a/2.png": 1, "photos/dog/3.png": 1}
    assert summary.index.classes == ("cat", "dog") and not said
    assert "no class for folders without an image: bird" in summary.lines()


def test_folders_without_images(tmp_path: Path) -> None:
    source = write(tmp_path / "x", [("w/a/1.png", IMAGE), ("w/b/1.png", IMAGE), ("w/c/1.heic", b"x")])
    (source / "w" / "d").mkdir()
    (source / "w" / ".e").mkdir()
    summary, _, found = prepared(source)
    assert found == {"w/a/1.png": 0, "w/b/1.png": 1}
    assert "no class for folders without an image: c, d" in summary.lines()


@pytest.mark.parametrize(
    ("folders", "warned"),
    [
        (["0", "1", "10", "2", "3", "4", "5", "6", "7", "8", "9"], "sorted as text, so class 2 need not be"),
        (["Cats", "cats", "dogs"], "Cats, cats differ in upper and lower case only"),
        (["00", "01", "02"], "numbered like parts"),
        (["Test", "train", "val"], "look like parts of a data set"),
        (["n01440764", "n01443537"], ""),
        (["1999", "2004", "2011"], ""),
    ],
)
def test_names_of_folders(tmp_path: Path, folders: list[str], warned: str) -> None:
    """Classes are numbered by their names as text, always, and what may surprise in that is said."""
    source = write(
        tmp_path / "x", [(f"{f}/{n}.png", IMAGE) for i, f in enumerate(folders) for n in range(2 + i % 2)]
    )
    summary, said, found = prepared(source)
    assert summary.index.classes == tuple(sorted(folders))
    assert {name.partition("/")[0]: label for name, label in found.items()} == dict(
        zip(sorted(folders), range(len(folders)), strict=True)
    )
    assert any(warned in text for text in said) if warned else not said


def test_a_class_whose_name_is_not_utf8(tmp_path: Path) -> None:
    source = write(tmp_path / "x", [("b/1.png", IMAGE), ("caf\udce9/1.png", IMAGE)])
    summary, _, _ = prepared(source)
    assert summary.index.classes == ("b", "caf\\udce9")
    "\n".join(summary.lines()).encode()  # can be printed


def test_names_that_would_steer_a_terminal(tmp_path: Path) -> None:
    source = write(tmp_path / "x.zip", [("b/1.png", IMAGE), ("c\x1b]0;d\x07/1.png", IMAGE)])
    summary, said, _ = prepared(source)
    assert summary.index.classes == ("b", "c\\x1b]0;d\\x07")
    assert all(line.isprintable() for line in (*summary.lines(), *said))


@pytest.mark.parametrize("place", ["x.zip", "x"])
def test_a_dataset_json_far_larger_than_the_images_need(tmp_path: Path, place: str) -> None:
    """Read, lists take 30 times the bytes of their text."""
    labels = b'{"labels": [' + b"[]," * (3 << 20) + b"[]]}"
    source = write(tmp_path / place, [("a.png", IMAGE), ("dataset.json", labels)])
    with pytest.raises(UserError, match=r"dataset\.json of .* cannot be read: larger than 8 MiB"):
        prepared(source)


def test_odd_members_of_a_zip(tmp_path: Path) -> None:
    """One listed twice is one image; links and ways out of the zip are left out; hidden is hidden."""
    link = zipfile.ZipInfo("link.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr(link, "a.png")
        for name in ("a.png", "a.png", "./b.png", "../c.png", "__MACOSX/._a.png", ".d/e.png", "f.txt"):
            file.writestr(name, IMAGE)
    summary, _, _ = prepared(tmp_path / "x.zip")
    assert summary.index.num_samples == 2
    assert sorted(item.kind for item in summary.left_out) == [
        ".txt",
        "hidden",
        "links",
        "macOS's own",
        "outside",
        "twice in the zip",
    ]


def test_a_zip_with_a_password(tmp_path: Path) -> None:
    path = write(tmp_path / "x.zip", [("a.png", IMAGE)])
    data = bytearray(path.read_bytes())
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="None of the 1 images of x can be read: encrypted"):
        prepare(str(path), str(tmp_path / "out"), Options(), workers=1)


def test_shards_beside_pictures_of_them(make_shards: MakeShards, tmp_path: Path) -> None:
    """A folder with an index of its shards is a folder of shards, whatever else lies there."""
    root = make_shards([3, 4], classes=2)
    prepare(str(root), str(tmp_path / "first"), Options(), workers=1)
    (root / "preview.gif").write_bytes(IMAGE)
    assert prepare(str(root), str(tmp_path / "second"), Options(), workers=1).num_samples == 7


def test_folders_in_a_tar(tmp_path: Path) -> None:
    """A tar of class folders is a shard without labels, and says so."""
    members = [(f"photos/{folder}/{n}.png", IMAGE) for folder in ("cat", "dog") for n in range(2)]
    source = write_tar(tmp_path / "photos" / "x.tar", members)
    _, said, found = prepared(source)
    assert not found and said[-1].startswith(
        "warning: the folders photos/cat, photos/dog of the shards are not taken for classes."
    )


def test_labels_of_shards_that_are_no_numbers_or_lacking(tmp_path: Path) -> None:
    members = [(f"{n}.{end}", data) for n in range(6) for end, data in (("cls", b"cat"), ("png", IMAGE))]
    write_tar(tmp_path / "text" / "s.tar", members)
    _, said, found = prepared(tmp_path / "text")
    assert not found and said[-1] == (
        "warning: the labels (.cls) of shard s.tar are no numbers of classes. A label is a file KEY.cls that "
        "holds one whole number from 0 to 999,999."
    )
    (tmp_path / "out").rename(tmp_path / "first")
    write_tar(tmp_path / "some" / "s.tar", [("a.png", IMAGE), ("b.cls", b"0"), ("b.png", IMAGE)])
    _, said, found = prepared(tmp_path / "some")
    assert found == {"s.tar/b": 0} and said[-1].startswith("warning: 1 image without a label, the first a. A")


def test_labels_that_nobody_wants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of shards and of known data sets, which bring their own."""
    write_tar(tmp_path / "x" / "s.tar", [("a.cls", b"3"), ("a.png", IMAGE)])
    summary, _, found = prepared(tmp_path / "x", classes="none")
    assert not found and not summary.index.num_classes
    two = Arrays("two", np.zeros((2, 8, 8), np.uint8), np.array([0, 1]), ("a", "b"))
    monkeypatch.setitem(KNOWN, "two", lambda announce: two)
    assert not prepare("two", str(tmp_path / "two"), Options(classes="none"), workers=1).num_classes
    for source in (str(tmp_path / "x"), "two"):
        with pytest.raises(UserError, match="--classes path is for folders and zips of images"):
            prepare(source, str(tmp_path / "by-path"), Options(classes="path"), workers=1)
    assert not (tmp_path / "by-path").exists()
