"""index.json says which shards there are, and is compared with them: in number, size, place and labels."""

from __future__ import annotations

import cProfile
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from faulty_server import serving
from streams import batches, ids, open_all
from tiny_shards import SIZE, MakeShards, image_of, members_of, write_tar

from pipeline.config import Data, UserError
from pipeline.data import sidecar
from pipeline.data.index import load_index
from pipeline.data.locate import Location
from pipeline.data.plan import Split
from pipeline.data.prepare.reindex import build_index
from pipeline.data.prepare.verify import verify
from pipeline.data.stream import check_images, label_frequencies

URLS = ["b.TAR", "deep/er/s-2.tar", "s-0.tar"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Shards in folders below, and one that is written otherwise."""
    for number, url in enumerate(URLS):
        write_tar(tmp_path / "data" / url, members_of(number, 3 + number, classes=2))
    describe(tmp_path / "data", *({"url": url} for url in URLS))
    return tmp_path / "data"


def describe(folder: Path, *entries: dict[str, object]) -> None:
    (folder / "index.json").write_text(json.dumps({"name": "mine", "shardlist": entries}))


def test_all_that_are_listed_are_there(folder: Path) -> None:
    index = load_index(str(folder))
    assert [shard.url for shard in index.shards] == URLS and index.sizes == (3, 4, 5)
    assert [len(index.table(shard)) for shard in range(3)] == [3, 4, 5]
    assert [(shard.url, shard.nsamples) for shard in verify(str(folder))] == list(
        zip(URLS, (3, 4, 5), strict=True)
    )
    rebuilt = build_index(str(folder))
    assert rebuilt == index and load_index(str(folder)) == index
    with serving(folder) as server:
        assert load_index(server.url).fingerprint == index.fingerprint


def test_only_folders_below(folder: Path) -> None:
    (folder / "s-0.tar").unlink()
    (folder / "b.TAR").unlink()
    with pytest.raises(UserError, match=r"b.TAR is missing .*index.json lists it"):
        load_index(str(folder))
    assert build_index(str(folder)).sizes == (4,)
    assert load_index(str(folder)).sizes == (4,)
    shutil.rmtree(folder / "deep")
    with pytest.raises(UserError, match=r"deep/er/s-2.tar is missing"):
        load_index(str(folder))
    with pytest.raises(UserError, match=r"no shards \(\*.tar\)"):
        build_index(str(folder))


def test_a_shard_that_is_not_listed_is_refused(folder: Path) -> None:
    load_index(str(folder))
    shutil.copy(folder / "s-0.tar", folder / "s-1.tar")
    with pytest.raises(UserError, match=r"holds s-1.tar, which index.json does not list"):
        load_index(str(folder))
    assert ["not listed" in "".join(shard.problems) for shard in verify(str(folder))].count(True) == 1
    assert build_index(str(folder)).sizes == (3, 4, 5, 5)


@pytest.mark.parametrize(
    "url", ["../s-0.tar", "/s-0.tar", "deep/../../s-0.tar", "a\0b.tar", "\ud800.tar", ""]
)
def test_names_outside_or_of_no_file(folder: Path, url: str) -> None:
    describe(folder, {"url": url})
    with pytest.raises(UserError, match="not the name of a shard inside the folder"):
        load_index(str(folder))


@pytest.mark.parametrize("url", [".", "deep"])
def test_a_folder_is_no_shard(folder: Path, url: str) -> None:
    describe(folder, *({"url": name} for name in (*URLS, url)))
    with pytest.raises(UserError, match=r"cannot be read: Is a directory"):
        load_index(str(folder))


def test_an_index_that_is_none_is_made_anew(make_shards: MakeShards) -> None:
    root = make_shards([3, 2])
    (root / "index.json").write_text("{")
    said: list[str] = []
    assert build_index(str(root), said.append).sizes == (3, 2)
    assert "index.json cannot be read" in said[0]
    load_index(str(root))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("nsamples", 10**30, "whole number from 0 to 1,000,000"),
        ("nsamples", 1_000_001, "whole number from 0 to"),
        ("nsamples", -1, "whole number from 0 to"),
        ("nsamples", True, "whole number from 0 to"),
        ("nsamples", 3.0, "whole number from 0 to"),
        ("nsamples", 2, "counts of its samples|has 3 samples, index.json says 2"),
        ("filesize", 2**63, "whole number from 0 to"),
        ("filesize", 1.5, "whole number from 0 to"),
        ("labels", {"0": 10**40}, "counts of its samples"),
        ("labels", {"0": 4}, "counts of its samples"),
        ("labels", {"7": 3}, "other labels than index.json says"),
        ("labels", {"0": 3}, "other labels than index.json says"),
        ("labels", {}, "other labels than index.json says"),
    ],
)
def test_an_index_that_lies(make_shards: MakeShards, key: str, value: object, message: str) -> None:
    """Of a folder here and at a URL: one message, before a wrong label or count gets anywhere."""
    root = make_shards([3, 3], classes=2)
    load_index(str(root))
    record = json.loads((root / "index.json").read_text())
    record["shardlist"][0][key] = value
    (root / "index.json").write_text(json.dumps(record))
    with serving(root) as server:
        for train in (str(root), server.url):
            with pytest.raises(UserError, match=message) as caught:
                index = load_index(train)
                check_images(index, Data(size=SIZE, channels=1, conditional=bool(value)))
                label_frequencies(index, Split(index.sizes, 0, 2, 0.3).training())
            assert "\n" not in str(caught.value)


def test_a_sidecar_that_says_another_size_is_not_used(make_shards: MakeShards) -> None:
    root = make_shards([3])
    index = load_index(str(root))
    place = root / ".shardgan" / "s-0000.tar.npz"
    table = sidecar.load(place)
    assert table is not None
    table.offset[2] = 2**40
    sidecar.save(replace(table, filesize=2**41), place)
    assert index.table(0).offset[2] < 10_000


def calls(action: Callable[[], object]) -> int:
    """How many calls it takes, of Python's functions and others."""
    profile = cProfile.Profile()
    profile.runcall(action)
    return sum(entry.callcount for entry in profile.getstats())


def test_listing_shards_is_linear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten times the shards, ten times the work; what index.json says of all is not gone through for each."""
    counts, lookups, entries = [], 0, Location.entries.fget

    def counted(self: Location) -> object:
        nonlocal lookups
        lookups += 1
        return entries(self)  # type: ignore[misc]

    monkeypatch.setattr(Location, "entries", property(counted))
    for shards in (20, 200):
        root = tmp_path / str(shards)
        write_tar(root / "s-0.tar", [("a.png", image_of(0, 0))])
        for shard in range(1, shards):
            os.link(root / "s-0.tar", root / f"s-{shard}.tar")
        index = load_index(str(root))
        counts.append(calls(lambda root=root: load_index(str(root))))
        assert calls(lambda index=index: [index.sizes[i] for i in range(len(index.sizes))]) < 3 * shards
    assert counts[1] < 12 * counts[0]


@pytest.mark.parametrize(
    "name", ["a shard.tar", "100%.tar", "bücher-画像.tar", "a#b?.tar", "X.TAR", "[1].tar"]
)
def test_names_of_shards(tmp_path: Path, name: str) -> None:
    write_tar(tmp_path / "d" / name, [("k.png", image_of(0, 5))])
    for train in (str(tmp_path / "d"), str(tmp_path / "d" / name), str(tmp_path / "d" / "*")):
        index, plan = open_all(Path(train))
        assert [shard.url for shard in index.shards] == [name]
        assert ids(next(batches(index, plan)))[0] == (0, 5)


def test_upper_case_shards_beside_an_older_index(make_shards: MakeShards) -> None:
    root = make_shards([3])
    before = load_index(str(root))
    write_tar(root / "MORE.TAR", [("k.png", image_of(0, 0))])
    assert load_index(str(root)) == before
    assert build_index(str(root)).sizes == (1, 3)


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "A.TAR.ZST", "a.tar.xz"])
def test_compressed_shards(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x1f\x8b" + bytes(600))
    with pytest.raises(UserError, match=rf"no shards .* but {name}: shards are not compressed"):
        load_index(str(tmp_path))


def test_linked_shards(tmp_path: Path) -> None:
    write_tar(tmp_path / "there" / "x.tar", [("k.png", image_of(0, 5))])
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "x.tar").symlink_to(tmp_path / "there" / "x.tar")
    assert load_index(str(tmp_path / "d")).sizes == (1,)
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "x.tar").symlink_to(tmp_path / "there" / "x.tar")
    (tmp_path / "e" / "y.tar").symlink_to(tmp_path / "there" / "y.tar")
    with pytest.raises(UserError, match=r"y.tar is a link to .*/there/y.tar, which is not there"):
        load_index(str(tmp_path / "e"))


def test_a_shard_that_is_listed_twice(make_shards: MakeShards) -> None:
    root = make_shards([3])
    load_index(str(root))
    record = json.loads((root / "index.json").read_text())
    entry = record["shardlist"][0]
    for second, fine in [
        (entry, True),
        (entry | {"url": "./s-0000.tar"}, False),
        (entry | {"nsamples": 2}, False),
    ]:
        (root / "index.json").write_text(json.dumps(record | {"shardlist": [entry, second]}))
        if fine:
            assert load_index(str(root)).sizes == (3,)
            continue
        with pytest.raises(UserError, match=r"lists shard s-0000\.tar twice"):
            load_index(str(root))
    (root / "index.json").write_text(json.dumps(record | {"shardlist": [entry | {"url": "./s-0000.tar"}]}))
    assert load_index(str(root)).sizes == (3,)


@pytest.mark.parametrize("key", ["unusable", "without_image"])
def test_an_index_whose_counts_are_none(make_shards: MakeShards, key: str) -> None:
    root = make_shards([3])
    load_index(str(root))
    record = json.loads((root / "index.json").read_text())
    record["shardlist"][0][key] = -1
    (root / "index.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=f"`{key}` of s-0000.tar is not a whole number"):
        load_index(str(root))


def test_names_in_an_index_can_be_shown(make_shards: MakeShards) -> None:
    root = make_shards([3, 3], classes=2)
    load_index(str(root))
    record = json.loads((root / "index.json").read_text())
    record |= {"classes": ["a\x1b]0;b\x07", "c\nd"], "license": "\x1b[2Jfree", "name": "e\x9bf"}
    (root / "index.json").write_text(json.dumps(record))
    index = load_index(str(root))
    assert index.classes == ("a\\x1b]0;b\\x07", "c\\nd")
    assert (index.license, index.name) == ("\\x1b[2Jfree", "e\\x9bf")
    for unfit in ("\x1b[2J", "\n", "\x9b", "\u202e", "\u2028"):
        record["shardlist"][0]["url"] = f"a{unfit}.tar"
        (root / "index.json").write_text(json.dumps(record))
        with pytest.raises(UserError, match="is not the name of a shard inside the folder") as caught:
            load_index(str(root))
        assert str(caught.value).isprintable()


def test_a_shard_may_have_any_name_that_can_be_shown(make_shards: MakeShards) -> None:
    root = make_shards([3])
    next(root.glob("*.tar")).rename(root / "é\u3000\xa0\U0001f642.tar")
    assert build_index(str(root)).num_samples == load_index(str(root)).num_samples == 3
