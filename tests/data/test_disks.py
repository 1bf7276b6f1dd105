"""Disks of this machine that are full or gone while shards are fetched: waited for, or named."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from faulty_server import FaultyServer
from fsspec.implementations.http import HTTPFileSystem
from remote_shards import QUICK, SOON, shards_kept

from pipeline.config import UserError
from pipeline.data import sidecar
from pipeline.data.index import load_index
from pipeline.data.remote import shard_cache, transfer
from pipeline.data.remote.disk import linked

PLENTY = 10**12
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


def free(monkeypatch: pytest.MonkeyPatch, *room: int) -> list[int]:
    """What the disk has free, each time it is asked; the last for good."""
    left = list(room)
    answer = lambda _: SimpleNamespace(free=left.pop(0) if len(left) > 1 else left[0])  # noqa: E731
    monkeypatch.setattr(shutil, "disk_usage", answer)
    return left


def test_room_that_other_transfers_will_fill_is_not_free(
    server: FaultyServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they have written counts no more, but for a file that is only as long as it will be."""
    index, claimed = load_index(server.url, remote=QUICK), 10**6
    first, second = (index.shards[shard].filesize for shard in (1, 2))
    (cache / "shards").mkdir()
    with (cache / "shards" / f"{'b' * 64}.{claimed}.part").open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.truncate(claimed)
        for room, kept in ((first + claimed - 1, 0), (first + claimed, 1)):
            free(monkeypatch, room)
            index.fetch_ahead(1, {index.shards[1].sha256}, threading.Event())
            assert len(shards_kept(cache)) == kept
        other.write(bytes(claimed))
        other.flush()
        os.fsync(other)
        free(monkeypatch, second)
        index.fetch_ahead(2, {index.shards[1].sha256}, threading.Event())
        assert len(shards_kept(cache)) == 2


def test_a_shard_that_is_needed_waits_for_room_on_a_full_disk(
    server: FaultyServer, monkeypatch: pytest.MonkeyPatch, full: Callable[[str, float], list[str]]
) -> None:
    """Without asking the server again before there is some."""
    monkeypatch.setattr(shard_cache, "_PASSING_S", 0.01)
    index = load_index(server.url, remote=QUICK)
    asked, left = full("s-0002.tar", 1), free(monkeypatch, PLENTY, 0, 0, PLENTY, -1)
    os.close(index.open(2))
    assert len(asked) == 2 and left == [-1]


def test_a_disk_that_stays_full_ends_the_wait_in_time(
    server: FaultyServer, monkeypatch: pytest.MonkeyPatch, full: Callable[[str, float], list[str]]
) -> None:
    monkeypatch.setattr(shard_cache, "_PASSING_S", 0.01)
    index = load_index(server.url, remote=SOON)
    asked, left = full("s-0002.tar", 10**9), free(monkeypatch, PLENTY, 0, 0, 0)
    with pytest.raises(UserError, match=r"s-0002.tar cannot be fetched: No space .*; see data.remote.folder"):
        index.open(2)
    assert len(asked) == 1 and left == [0]


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
    """Again and again: the server is not said to lack the shard."""

    async def get(self: HTTPFileSystem, url: str, to: str, **options: object) -> None:
        await GET(self, url, to, **options)
        shutil.rmtree(cache / "shards")

    index = load_index(server.url, remote=SOON)
    monkeypatch.setattr(HTTPFileSystem, "_get_file", get)
    message = r"s-0002.tar cannot be fetched: No such file .* on this machine \(\S+\.part\); see data.remote"
    with pytest.raises(UserError, match=message):
        index.open(2)


def test_a_sidecar_that_does_not_fit_is_no_error(
    server: FaultyServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody needs it: it says what a walk through the shard finds."""
    index = load_index(server.url, remote=QUICK)
    expected = index.table(1).label.tolist()
    shutil.rmtree(cache)

    def full(*_: object) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    with monkeypatch.context() as disk:
        disk.setattr(sidecar, "save", full)
        again = load_index(server.url, remote=QUICK)
        os.close(again.open(1))
        assert len(shards_kept(cache)) == 1 and not list(cache.rglob("*.npz"))
        assert again.table(1).label.tolist() == expected
