"""Fixtures of the data tests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from faulty_server import FaultyServer, serving
from remote_shards import SHARDS
from tiny_shards import MakeShards, members_of, png, write_tar

from pipeline.data.index import Index, load_index


@pytest.fixture
def make_shards(tmp_path: Path) -> MakeShards:
    """Write a folder of shards with so many samples each."""

    def make(sizes: Sequence[int], classes: int = 0, folder: str = "shards") -> Path:
        for shard, rows in enumerate(sizes):
            write_tar(tmp_path / folder / f"s-{shard:04d}.tar", members_of(shard, rows, classes))
        return tmp_path / folder

    return make


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("SHARDGAN_CACHE", str(folder))
    return folder


@pytest.fixture
def local(make_shards: MakeShards) -> Index:
    return load_index(str(make_shards(SHARDS, classes=3)))


@pytest.fixture
def server(local: Index) -> Iterator[FaultyServer]:
    with serving(local.root) as server:
        yield server


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """cats: 7 grey ones of 10x10, dogs: 5 of 12x8 in colour."""
    rng = np.random.default_rng(0)
    for folder, count, shape in [("cats", 7, (10, 10)), ("dogs", 5, (8, 12, 3))]:
        (tmp_path / "pictures" / folder).mkdir(parents=True)
        for i in range(count):
            path = tmp_path / "pictures" / folder / f"{i}.png"
            path.write_bytes(png(rng.integers(0, 256, shape, dtype=np.uint8)))
    return tmp_path / "pictures"


@pytest.fixture
def shard(tmp_path: Path) -> bytes:
    return write_tar(tmp_path / "good.tar", members_of(3, 12, classes=5)).read_bytes()
