"""index.json and sidecars: built when missing, believed when they fit, refused when they do not."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import shutil
import zlib
from pathlib import Path

import pytest
from tiny_shards import MakeShards, image_of, write_tar

from pipeline.config import UserError
from pipeline.data.index import Index, load_index
from pipeline.data.prepare.reindex import build_index
from pipeline.data.samples import IMAGE_EXTENSIONS


def test_index_is_built_once_and_says_so(make_shards: MakeShards) -> None:
    root = make_shards([3, 5], classes=4)
    said: list[str] = []
    built = load_index(str(root), said.append)
    assert len(said) == 1 and "Indexing 2 shards" in said[0]
    assert load_index(str(root), said.append) == built and len(said) == 1
    assert (built.num_samples, built.num_classes, built.sizes) == (8, 4, (3, 5))
    assert built.classes == ("0", "1", "2", "3")
    assert [shard.url for shard in built.shards] == ["s-0000.tar", "s-0001.tar"]
    assert built.shards[0].labels == {0: 1, 1: 1, 2: 1}


def test_index_json_is_what_wids_reads(make_shards: MakeShards) -> None:
    root = make_shards([3], classes=2)
    load_index(str(root))
    record = json.loads((root / "index.json").read_text())
    data = (root / "s-0000.tar").read_bytes()
    assert record == {
        "wids_version": 1,
        "name": "shards",
        "shardlist": [
            {
                "url": "s-0000.tar",
                "nsamples": 3,
                "filesize": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
                "labels": {"0": 2, "1": 1},
            }
        ],
    }


def test_a_bare_wids_index_is_completed_and_kept(make_shards: MakeShards) -> None:
    root = make_shards([3, 2])
    text = json.dumps(
        {"wids_version": 1, "name": "theirs", "shardlist": [{"url": "s-0000.tar"}, {"url": "s-0001.tar"}]}
    )
    (root / "index.json").write_text(text)
    index = load_index(str(root))
    assert index.name == "theirs" and index.sizes == (3, 2) and len(index.shards[0].sha256) == 64
    assert (root / "index.json").read_text() == text


def test_unlabelled(make_shards: MakeShards) -> None:
    index = load_index(str(make_shards([3])))
    assert index.num_classes == 0 and index.classes == () and index.shards[0].labels == {}


def test_compressed_shards_beside_others_are_told(make_shards: MakeShards) -> None:
    root = make_shards([3, 5])
    for name in ("s-0000.tar.gz", "s-0002.tar.gz", "s-0003.tgz", "notes.txt"):  # the first is there unpacked
        (root / name).write_bytes(b"x")
    said: list[str] = []
    assert load_index(str(root), said.append).sizes == (3, 5)
    assert [line for line in said if line.startswith("warning: s-0002.tar.gz and 1 more in ")]
    said.clear()
    assert build_index(str(root), said.append).sizes == (3, 5)
    assert [line for line in said if line.startswith("warning: s-0002.tar.gz and 1 more in ")]


def test_shards_in_folders_below_are_told(make_shards: MakeShards) -> None:
    """A folder stands for the shards in it, and a pattern for those below, which index.json may list."""
    root = make_shards([3, 5])
    for folder in ("val", "train"):
        (root / folder).mkdir()
        shutil.copy(root / "s-0000.tar", root / folder / "s-0009.tar")
    (root / "images").mkdir()
    said: list[str] = []
    assert load_index(str(root), said.append).sizes == (3, 5)
    assert [line for line in said if line.startswith("warning: the shards of train and 1 more in ")]
    assert load_index(f"{root}/**/*.tar").sizes == (3, 5, 3, 3)
    for name in ("s-0000.tar", "s-0001.tar", "index.json"):
        (root / name).unlink()
    with pytest.raises(UserError, match=r"no shards \(\*\.tar\) in \S+ itself, but in train and 1 more"):
        load_index(str(root))
    record = {"wids_version": 1, "shardlist": [{"url": "train/s-0009.tar"}, {"url": "val/s-0009.tar"}]}
    (root / "index.json").write_text(json.dumps(record))
    said.clear()
    assert build_index(str(root), said.append).sizes == (3, 3)
    assert not [line for line in said if line.startswith("warning")]


def test_index_json_stands_for_its_folder(make_shards: MakeShards) -> None:
    root = make_shards([3, 5])
    whole = load_index(str(root))
    assert load_index(str(root / "index.json")).shards == whole.shards


def test_fingerprint_is_of_the_contents(make_shards: MakeShards, tmp_path: Path) -> None:
    a = load_index(str(make_shards([3, 5])))
    shutil.copytree(a.root, tmp_path / "copy")
    assert load_index(str(tmp_path / "copy")).fingerprint == a.fingerprint
    assert load_index(str(make_shards([3, 5], classes=2, folder="c"))).fingerprint != a.fingerprint


def test_glob_braces_and_one_file_choose_shards(make_shards: MakeShards) -> None:
    root = make_shards([1, 2, 3, 4])
    whole = load_index(str(root))
    for train, sizes in [
        (f"{root}/s-000[12].tar", (2, 3)),
        (f"{root}/*.tar", (1, 2, 3, 4)),
        (f"{root}/s-{{0000..0002}}.tar", (1, 2, 3)),
        (f"{root}/s-{{0003,0000}}.tar", (1, 4)),
        (f"{root}/s-0001.tar", (2,)),
    ]:
        index = load_index(train)
        assert index.sizes == sizes and index.root == root
        assert set(index.shards) <= set(whole.shards)


def test_part_of_a_folder_leaves_no_index_of_the_whole(make_shards: MakeShards) -> None:
    root = make_shards([1, 2, 3])
    assert load_index(f"{root}/s-{{0000..0001}}.tar").sizes == (1, 2)
    assert not (root / "index.json").exists()
    assert load_index(str(root)).sizes == (1, 2, 3)


def test_shards_in_several_folders(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_tar(tmp_path / name / "x.tar", [("k.png", image_of(0, 0))])
    index = load_index(f"{tmp_path}/{{a,b}}/x.tar")
    assert [shard.url for shard in index.shards] == ["a/x.tar", "b/x.tar"]
    assert index.table(1).key(0) == "k"


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("{root}/nowhere", "no shards at .*/nowhere"),
        ("{root}/*.tgz", "no shards at"),
        ("{root}/s-{{0000..0007}}.tar", "s-0003.tar is missing"),
        ("{root}/s-{{0000", "not a brace list"),
        ("{root}/empty", r"no shards \(\*.tar\) in .*/empty"),
        ("ftp://example.org/x.tar", "not on this machine"),
        ("pipe:cat x.tar", "is a command, not a place"),
        ("pipe:curl https://example.org/x.tar", "not on this machine"),
    ],
)
def test_no_shards(make_shards: MakeShards, train: str, message: str) -> None:
    root = make_shards([1, 2, 3])
    (root / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        load_index(train.format(root=root))


def test_shards_that_are_not_the_indexed_ones(make_shards: MakeShards) -> None:
    root = make_shards([3, 5, 4])
    load_index(str(root))
    shard = root / "s-0001.tar"
    data = shard.read_bytes()

    shard.write_bytes(data[:-512])
    with pytest.raises(UserError, match=r"s-0001.tar .* has \d+ bytes, not the \d+"):
        load_index(str(root))
    shard.unlink()
    with pytest.raises(UserError, match=r"s-0001.tar is missing"):
        load_index(str(root))
    shard.write_bytes(data)
    load_index(str(root))
    shutil.copy(shard, root / "s-0009.tar")
    with pytest.raises(UserError, match=r"holds s-0009.tar, which index.json does not list"):
        load_index(str(root))


def test_a_changed_shard_is_noticed_when_its_sidecar_is_gone(make_shards: MakeShards) -> None:
    root = make_shards([3])
    load_index(str(root))
    shutil.rmtree(root / ".shardgan")
    write_tar(root / "s-0000.tar", [(f"k{i}.png", image_of(7, i)) for i in range(3)])
    with pytest.raises(UserError, match="another SHA-256"):
        load_index(str(root))
    assert build_index(str(root)).table(0).key(0) == "k0"
    load_index(str(root))


def test_index_that_counts_wrongly(make_shards: MakeShards) -> None:
    root = make_shards([3])
    load_index(str(root))
    record = json.loads((root / "index.json").read_text())
    record["shardlist"][0]["nsamples"] = 30
    (root / "index.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"has 3 samples, index.json says 30"):
        load_index(str(root)).table(0)


@pytest.mark.parametrize(
    "entry",
    [
        {"url": "../../etc/passwd.tar"},
        {"url": "/etc/passwd.tar"},
        {"url": "https://example.org/a.tar"},
        {"url": 5},
        {},
        "s-0000.tar",
        {"url": "s-0000.tar", "nsamples": -1},
        {"url": "s-0000.tar", "filesize": "12"},
        {"url": "s-0000.tar", "labels": {"10000000000": 1}},
        {"url": "s-0000.tar", "labels": {"a": 1}},
        {"url": "s-0000.tar", "labels": []},
        {"url": "s-0000.tar", "sha256": 5},
    ],
)
def test_hostile_index(make_shards: MakeShards, entry: object) -> None:
    root = make_shards([3])
    (root / "index.json").write_text(json.dumps({"shardlist": [entry]}))
    with pytest.raises(UserError, match=r"index.json"):
        load_index(str(root))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"shardlist": 1}', "[" * 100_000])
def test_index_json_that_is_none(make_shards: MakeShards, text: str) -> None:
    root = make_shards([3])
    (root / "index.json").write_text(text)
    with pytest.raises(UserError, match=r"index.json .*--index-only"):
        load_index(str(root))


def test_error_names_shard_and_byte(make_shards: MakeShards) -> None:
    root = make_shards([3, 3])
    data = (root / "s-0001.tar").read_bytes()
    (root / "s-0001.tar").write_bytes(data[:1536])
    with pytest.raises(UserError, match=r"shard s-0001.tar, byte 1536: truncated"):
        load_index(str(root))


def test_folder_of_empty_tars(tmp_path: Path) -> None:
    write_tar(tmp_path / "d" / "x.tar", [])
    with pytest.raises(UserError, match="no samples"):
        load_index(str(tmp_path / "d"))


def test_data_that_cannot_be_written_to_are_indexed_in_the_cache(
    make_shards: MakeShards, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_shards([3, 4])
    before = sorted(root.iterdir())
    _refuse_writes(monkeypatch, root)
    said: list[str] = []
    index = load_index(str(root), said.append)
    assert sorted(root.iterdir()) == before
    assert len(list(cache.rglob("*.npz"))) == 2 and len(list(cache.rglob("index.json"))) == 1
    assert load_index(str(root), said.append) == index and len(said) == 1
    assert index.table(1).key(3) == "1-3"


def test_nowhere_to_write(make_shards: MakeShards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_shards([3])
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SHARDGAN_CACHE", str(tmp_path / "file"))
    _refuse_writes(monkeypatch, root)
    with pytest.raises(UserError, match="SHARDGAN_CACHE"):
        load_index(str(root))


def _refuse_writes(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    """As a read-only file system does, for root as well, whom permissions do not stop."""
    opened, mkdir = Path.open, Path.mkdir

    def refuse(path: Path, writing: bool) -> None:
        if writing and path.is_relative_to(root):
            raise OSError(30, "Read-only file system")

    def open_(self: Path, mode: str = "r", *args: object, **kwargs: object) -> object:
        refuse(self, mode[0] != "r")
        return opened(self, mode, *args, **kwargs)  # type: ignore[call-overload]

    def mkdir_(self: Path, *args: object, **kwargs: object) -> None:
        refuse(self, not self.exists())
        mkdir(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "open", open_)
    monkeypatch.setattr(Path, "mkdir", mkdir_)
    monkeypatch.setattr(Path, "write_text", lambda self, text: open_(self, "w").write(text))  # type: ignore[attr-defined]


def _load(root: str, barrier: object, results: object) -> None:
    barrier.wait()  # type: ignore[attr-defined]
    index = load_index(root)
    results.put((index.fingerprint, [index.table(i).key(0) for i in range(len(index.shards))]))  # type: ignore[attr-defined]


def test_several_processes_build_at_once(make_shards: MakeShards) -> None:
    root = make_shards([50] * 6)
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(4), context.Queue()
    ranks = [context.Process(target=_load, args=(str(root), barrier, results)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    answers = [results.get(timeout=60) for _ in ranks]
    for rank in ranks:
        rank.join()
    assert all(answer == answers[0] for answer in answers)
    assert len(list((root / ".shardgan").iterdir())) == 6, "nothing temporary is left"
    assert json.loads((root / "index.json").read_text())["shardlist"]


def test_index_only_keeps_what_prepare_recorded(make_shards: MakeShards) -> None:
    root = make_shards([4], classes=2)
    record = {"name": "pets", "classes": ["cat", "dog"], "shardlist": []}
    (root / "index.json").write_text(json.dumps(record))
    built: Index = build_index(str(root))
    assert built.classes == ("cat", "dog") and built.name == "pets"
    again = build_index(str(root))
    assert again == built and load_index(str(root)) == built


def test_an_array_is_the_image_only_where_there_is_no_other(tmp_path: Path) -> None:
    """As img2dataset's shards have it: a .npy beside a picture is its embedding."""
    picture = image_of(0, 0)
    members = [("a.npy", b"embedding"), ("a.png", picture), ("b.png", picture), ("b.npy", b"embedding")]
    write_tar(tmp_path / "d" / "x.tar", [*members, ("c.npy", b"picture")])
    table = load_index(str(tmp_path / "d")).table(0)
    assert [IMAGE_EXTENSIONS[e] for e in table.extension] == ["png", "png", "npy"]
    whole = (tmp_path / "d" / "x.tar").read_bytes()
    for row, data in enumerate([picture, picture, b"picture"]):
        assert whole[table.offset[row] :][: table.size[row]] == data
        assert table.crc[row] == zlib.crc32(data)
