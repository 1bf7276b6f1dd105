"""Disks of this machine that are full or gone while shards are fetched: named."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from faulty_server import FaultyServer
from fsspec.implementations.http import HTTPFileSystem
from remote_shards import QUICK

from pipeline.config import UserError
from pipeline.data.index import load_index
from pipeline.data.remote import transfer
from pipeline.data.remote.disk import linked

GET = HTTPFileSystem._get_file


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, float], list[str]]:
    """Let the disk be full for files of such a name, so many times. The list names those asked for."""

    def fill(name: str, times: float) -> list[str]:
        asked: list[str] = []

        async def get(self: HTTPFileSystem, url: str, to: str, **options: object) -> None:
            if url.endswith(name):
                asked.append(url)
                if len(asked) <= times:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            await GET(self, url, to, **options)

        monkeypatch.setattr(HTTPFileSystem, "_get_file", get)
        return asked

    return fill


@pytest.mark.parametrize("removing", [False, True])
def test_the_folder_for_temporary_files_is_gone(
    server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, removing: bool
) -> None:
    """Shards are fetched without it, unless the protocol's library removes what it could not fetch."""
    index = load_index(server.url, remote=QUICK)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    message = rf"^TMPDIR \({tmp_path}/gone\) cannot be written: No such file or directory\. Set TMPDIR to a"
    with pytest.raises(UserError, match=message):
        load_index(server.url, remote=QUICK)
    if removing:
        monkeypatch.setattr(transfer, "_REMOVING", ("http",))
        with pytest.raises(UserError, match=message):
            index.open(2)
        with pytest.raises(UserError, match=message):  # gone only after it was made
            linked(tmp_path / "gone" / "link", tmp_path)
    else:
        os.close(index.open(2))


def test_no_folder_at_all_for_temporary_files(
    server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "gone")])
    monkeypatch.setenv("TMPDIR", "/chosen")
    with pytest.raises(UserError, match=r"^TMPDIR \(/chosen\) cannot be written: No usable .* Set TMPDIR"):
        load_index(server.url, remote=QUICK)


def test_a_full_folder_for_temporary_files(
    server: FaultyServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    full: Callable[[str, float], object],
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    full("index.json", 10**9)
    message = rf"index.json cannot be fetched: No space .* on this machine; set TMPDIR \({tmp_path}\) to a"
    with pytest.raises(UserError, match=message):
        load_index(server.url, remote=QUICK)


def test_a_cache_that_is_removed_while_a_shard_comes(
    server: FaultyServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server is not said to lack the shard."""

    async def get(self: HTTPFileSystem, url: str, to: str, **options: object) -> None:
        await GET(self, url, to, **options)
        shutil.rmtree(cache / "shards")

    index = load_index(server.url, remote=QUICK)
    monkeypatch.setattr(HTTPFileSystem, "_get_file", get)
    message = r"s-0002.tar cannot be fetched: No such file .* on this machine \(\S+\.part\); see data.remote"
    with pytest.raises(UserError, match=message):
        index.open(2)
