"""Data sets known by name: read right, and fetched by the first way that works."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from tiny_shards import png

from pipeline.config import UserError
from pipeline.data.index import load_index
from pipeline.data.locate import FETCHED
from pipeline.data.prepare import known
from pipeline.data.prepare.writer import Options, prepare


def write_idx(path: Path, array: np.ndarray) -> str:
    data = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data))
    return hashlib.sha256(data).hexdigest()


def test_fashion_mnist_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (2, 5, 28, 28), dtype=np.uint8), rng.integers(0, 10, (2, 5), dtype=np.uint8)
    arrays = dict(zip(known._FASHION_FILES, (x[0], y[0], x[1], y[1]), strict=True))
    hashes = {name: write_idx(tmp_path / "fm" / name, array) for name, array in arrays.items()}
    monkeypatch.setattr(known, "_FASHION_SYSTEM", tmp_path / "fm")
    with pytest.raises(UserError, match="not the published"):
        known.fashion_mnist(print)
    monkeypatch.setattr(known, "_FASHION_FILES", hashes)
    data = known.fashion_mnist(print)
    assert (data.images == x.reshape(-1, 28, 28)).all() and (data.labelled.values == y.reshape(-1)).all()
    index = prepare("fashion-mnist", str(tmp_path / "out"), Options(size=32), workers=1)
    assert index.num_samples == 10 and index.class_names == data.labelled.classes
    shard = webdataset.WebDataset(f"{tmp_path}/out/shard-000000.tar", shardshuffle=False).decode("l8")
    assert {s["png"][2:30, 2:30].tobytes() for s in shard} == {image.tobytes() for image in data.images}


def test_ways_to_fetch_are_tried_in_turn(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known, "_FASHION_SYSTEM", tmp_path / "not installed")
    monkeypatch.setenv("PATH", str(tmp_path))  # no apt-get
    files = dict.fromkeys(known._FASHION_FILES, b"x")
    asked: list[str] = []

    def download(url: str, path: Path) -> None:
        asked.append(url)
        path.write_bytes(files[path.name])

    monkeypatch.setattr(known, "_download", download)
    said: list[str] = []
    with pytest.raises(UserError, match="cannot be read"):  # fetched, but not gzip
        known.fashion_mnist(said.append)
    assert "apt-get" in said[0] and "did not work" in said[1] and len(asked) == 4
    assert sorted(path.name for path in cache.iterdir()) == ["fashion-mnist"]

    def unreachable(url: str, path: Path) -> None:
        raise OSError("no route to host")

    with pytest.raises(UserError, match=r"CIFAR-10 could not be fetched:\n  The files in .*read as CIFAR-10"):
        monkeypatch.setitem(files, "cifar-10-binary.tar.gz", b"<html>log in</html>")
        known.cifar10(said.append)
    monkeypatch.setattr(known, "_download", unreachable)
    with pytest.raises(UserError, match=r"CIFAR-10 could not be fetched:\n  no route to host\n  .*npm"):
        known.cifar10(said.append)
    assert sorted(path.name for path in cache.iterdir()) == ["fashion-mnist"]


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def test_cifar_files_of_both_kinds(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x, y = (
        rng.integers(0, 256, (6, 4, 32, 32, 3), dtype=np.uint8),
        rng.integers(0, 10, (6, 4), dtype=np.uint8),
    )
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    with tarfile.open(tmp_path / "npm.tgz", "w:gz") as tar:
        for name, images_ in zip(names, x, strict=True):
            _add(tar, f"package/{name}.png", png(images_.reshape(4, 1024, 3)))
        _add(tar, "package/train_lables.json", json.dumps(y[:5].reshape(-1).tolist()).encode())
        _add(tar, "package/test_lables.json", json.dumps(y[5].tolist()).encode())
    with tarfile.open(tmp_path / "bin.tgz", "w:gz") as tar:
        for name, images_, labels in zip(names, x, y, strict=True):
            records = [
                bytes([c]) + i.transpose(2, 0, 1).tobytes() for i, c in zip(images_, labels, strict=True)
            ]
            _add(tar, f"cifar-10-batches-bin/{name}.bin", b"".join(records))
    for read, name in [(known._read_npm_cifar, "npm.tgz"), (known._read_binary_cifar, "bin.tgz")]:
        images_, labels = read(tmp_path / name)
        assert (images_ == x.reshape(-1, 32, 32, 3)).all() and (labels == y.reshape(-1)).all()


def test_of_two_that_fetch_at_once_the_slower_one_takes_what_is_there(tmp_path, monkeypatch):
    monkeypatch.setenv("SHARDGAN_CACHE", str(tmp_path))

    def fetch(folder: Path, _: object) -> None:
        (folder / "data").write_text("mine")
        (tmp_path / "faces").mkdir()  # by another process, meanwhile
        (tmp_path / "faces" / "data").write_text("theirs")

    found = known._fetched("Faces", "faces", (fetch,), print)
    assert found == tmp_path / "faces" and (found / "data").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["faces"]


def test_a_missing_folder_of_a_known_data_set_is_to_be_fetched(tmp_path: Path) -> None:
    assert set(FETCHED) == set(known.KNOWN)
    with pytest.raises(UserError, match=r"Fetch it: `shardgan prepare fashion-mnist \S+/fashion-mnist`\.$"):
        load_index(str(tmp_path / "fashion-mnist"))
