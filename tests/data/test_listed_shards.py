"""index.json says which shards there are, and is compared with them: in number, size, place and labels."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from faulty_server import serving
from tiny_shards import SIZE, MakeShards, members_of, write_tar

from pipeline.config import Data, UserError
from pipeline.data import sidecar
from pipeline.data.index import load_index
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
