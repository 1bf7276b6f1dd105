"""Fixtures of the data tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from tiny_shards import members_of, write_tar

MakeShards = Callable[..., Path]


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
