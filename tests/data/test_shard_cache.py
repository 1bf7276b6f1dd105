"""The cache of shards from elsewhere: shared, bounded, checked, and safe from kills and full disks."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from faulty_server import FaultyServer
from fsspec.implementations.http import HTTPFileSystem
from no_flock import ERRORS
from remote_shards import NAMES, QUICK, close_all, shards_kept
from streams import data_of
from tiny_shards import SIZE

from pipeline.config import Data, Remote, UserError
from pipeline.data.index import Index, load_index
from pipeline.data.plan import Split
from pipeline.data.reader import BadSampleError, Reader
from pipeline.data.remote import shard_cache, transfer
from pipeline.data.remote.prefetch import Prefetch
from pipeline.data.stream import check_images, heldout_batches, label_frequencies

PROCESS = """
import os, sys
from pipeline.config import Remote
from pipeline.data.index import load_index

index = load_index(sys.argv[1], remote=Remote(timeout_s=60.0))
print("ready", flush=True)
sys.stdin.readline()
for shard in range(len(index.shards)):
    file = index.open(shard)
    assert os.fstat(file).st_size == index.shards[shard].filesize
print("done", flush=True)
"""


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.stdin.write("\n")
    process.stdin.flush()


def start(server: FaultyServer) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(
        [sys.executable, "-c", PROCESS, server.url],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def test_processes_share_a_cache_and_survive_each_other(server: FaultyServer, cache: Path) -> None:
    """Each shard is fetched once by whoever comes first; when that one is killed in the midst, by another."""
    server.hurt(NAMES[0], "stall")
    first, second = start(server), start(server)
    index = load_index(server.url, remote=Remote(timeout_s=60.0))
    go(first)
    while not list((cache / "shards").glob("*.part")) or not server.asked[NAMES[0]]:
        assert first.poll() is None
        threading.Event().wait(0.01)
    go(second)
    with ThreadPoolExecutor(5) as pool:
        files = pool.map(index.open, range(5))
        first.kill()
        close_all(list(files))
    assert second.communicate(timeout=60)[0] == "done\n" and second.returncode == 0
    first.communicate(timeout=60)
    assert [server.asked[name] for name in NAMES] == [2, 1, 1, 1, 1]
    assert len(shards_kept(cache)) == 5 and not list((cache / "shards").glob("*.part"))


def test_the_cache_keeps_to_its_bound_and_to_what_is_read(
    local: Index, server: FaultyServer, cache: Path
) -> None:
    sizes = [shard.filesize for shard in local.shards]
    limit = sizes[0] + sizes[2] + sizes[4]
    index = load_index(server.url, remote=Remote(gb=limit / 1e9))
    held = index.open(0)
    for shard in (1, 2, 3, 4, 1, 2, 4):
        os.close(index.open(shard))
        kept = {path.stem for path in shards_kept(cache)}
        assert sum(path.stat().st_size for path in shards_kept(cache)) <= limit or kept == {
            index.shards[0].sha256,
            index.shards[shard].sha256,
        }
        assert {index.shards[0].sha256, index.shards[shard].sha256} <= kept
    assert server.asked[NAMES[0]] == 1
    files = [held, *(index.open(shard) for shard in (1, 2, 3, 4))]  # all read at once: more than the bound
    assert len(shards_kept(cache)) == 5
    close_all(files)
    os.close(index.open(0))
    (cache / "shards" / f"{index.shards[3].sha256}.tar").unlink()
    asked = server.asked.total()
    everything = {shard.sha256 for shard in index.shards}
    index.fetch_ahead(2, everything, threading.Event())  # is here
    index.fetch_ahead(3, everything, threading.Event())  # has no room unless others go
    assert server.asked.total() == asked
    index.fetch_ahead(3, (), threading.Event())
    assert (cache / "shards" / f"{index.shards[3].sha256}.tar").exists()
    assert sum(path.stat().st_size for path in shards_kept(cache)) <= limit


def with_one(server: FaultyServer, cache: Path) -> tuple[Index, Path]:
    """An index, and the one shard of it, number 2, that is kept."""
    index = load_index(server.url, remote=QUICK)
    os.close(index.open(2))
    [kept] = shards_kept(cache)
    return index, kept


def test_a_shard_that_another_process_finishes_at_this_moment_is_not_fetched_again(
    server: FaultyServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, whole = with_one(server, cache)
    part = whole.rename(whole.with_name(f"{whole.stem}.{index.shards[2].filesize}.part"))
    looked = shard_cache._remove_unused

    def finished_before(path: Path) -> bool:
        if path == part and part.exists():
            part.rename(whole)
        return looked(path)

    monkeypatch.setattr(shard_cache, "_remove_unused", finished_before)
    os.close(index.open(2))
    assert whole.exists() and server.asked[NAMES[2]] == 1


def test_a_damaged_copy_that_another_process_replaces_at_this_moment_stays(
    server: FaultyServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, copy = with_one(server, cache)
    whole = copy.read_bytes()
    copy.write_bytes(whole[:512])
    remove = shard_cache._remove_damaged

    def replaced_before(path: Path, size: int) -> None:
        path.with_suffix(".new").write_bytes(whole)
        path.with_suffix(".new").replace(path)
        remove(path, size)

    monkeypatch.setattr(shard_cache, "_remove_damaged", replaced_before)
    os.close(index.open(2))
    assert copy.read_bytes() == whole and server.asked[NAMES[2]] == 1


def test_a_copy_that_goes_while_room_is_made(
    server: FaultyServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, gone = with_one(server, cache)
    listed = Path.iterdir

    def then_gone(folder: Path) -> Iterator[Path]:
        entries = list(listed(folder))
        if folder == gone.parent:
            gone.unlink(missing_ok=True)
        yield from entries

    monkeypatch.setattr(Path, "iterdir", then_gone)
    os.close(index.open(3))
    assert not gone.exists()


@pytest.mark.parametrize("fault", ["cut", "says more", "stall"])
def test_a_protocol_that_removes_what_it_could_not_fetch(
    local: Index, server: FaultyServer, cache: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """As gcsfs does: the next attempt goes to the file that is locked all the same."""
    get = HTTPFileSystem._get_file

    async def get_or_remove(self: HTTPFileSystem, url: str, to: str, **options: object) -> None:
        try:
            await get(self, url, to, **options)
        except BaseException:
            Path(to).unlink(missing_ok=True)
            raise

    monkeypatch.setattr(HTTPFileSystem, "_get_file", get_or_remove)
    monkeypatch.setattr(transfer, "_REMOVING", ("http",))
    index = load_index(server.url, remote=QUICK)
    server.hurt(NAMES[2], fault)
    reader, here = Reader(index, 2), Reader(local, 2)
    assert [reader.read(2, row) for row in range(13)] == [here.read(2, row) for row in range(13)]
    reader.close()
    here.close()
    assert len(shards_kept(cache)) == 1 and server.asked[NAMES[2]] == 2


def test_files_of_others_in_the_folder_of_the_cache_stay(
    local: Index, server: FaultyServer, tmp_path: Path
) -> None:
    """They are neither removed nor counted; what a killed process has left of a transfer goes."""
    kept = tmp_path / "kept"
    kept.mkdir()
    theirs = ["mine.tar", f"{'A' * 64}.tar", "download.part", "x.5.part", f"{'a' * 64}.part", "notes"]
    for name in theirs:
        (kept / name).write_bytes(bytes(100_000))
    (kept / f"{'a' * 64}.7.part").write_bytes(b"left")
    limit = sum(sorted(shard.filesize for shard in local.shards)[-2:])
    index = load_index(server.url, remote=Remote(folder=str(kept), gb=limit / 1e9))
    with (kept / "download.part").open("rb") as locked:
        fcntl.flock(locked, fcntl.LOCK_EX)
        for shard in (0, 1, 2, 3):
            os.close(index.open(shard))
    ours = {f"{index.shards[shard].sha256}.tar" for shard in (2, 3)}
    assert {path.name for path in kept.iterdir()} == {*theirs, *ours, ".lock"}


def test_too_small_a_bound_is_refused(server: FaultyServer) -> None:
    index = load_index(server.url, remote=Remote(gb=1e-6))
    with pytest.raises(UserError, match=r"data.remote.gb=1e-06 is too little: two windows of 2 shards"):
        check_images(index, Data(size=SIZE, channels=1, window=2))


def test_a_copy_that_is_damaged_on_this_disk(server: FaultyServer, cache: Path) -> None:
    index = load_index(server.url)
    os.close(index.open(2))
    (kept,) = shards_kept(cache)
    os.truncate(kept, 512)
    os.close(index.open(2))
    assert server.asked[NAMES[2]] == 2 and kept.stat().st_size == index.shards[2].filesize
    data = bytearray(kept.read_bytes())
    data[int(index.table(2).offset[4]) + 20] ^= 4
    kept.write_bytes(data)
    reader = Reader(index, 2)
    with pytest.raises(BadSampleError, match=rf"wrong CRC\). Remove {kept} to fetch it again"):
        reader.read(2, 4)
    reader.close()
    kept.unlink()
    os.close(index.open(2))
    assert server.asked[NAMES[2]] == 3


def test_a_full_disk(server: FaultyServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The room there is bounds the cache too; without any there is one message."""
    index = load_index(server.url)
    os.close(index.open(0))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    os.close(index.open(1))
    assert [path.stem for path in shards_kept(cache)] == [index.shards[1].sha256]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        with pytest.raises(
            UserError, match=r"s-0002.tar cannot be fetched: .* on this machine; see data.remote"
        ):
            index.open(2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_a_cache_that_is_removed_during_a_transfer(
    server: FaultyServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by who frees a disk, or a cleaner of /tmp. The shard is fetched again."""
    index, times = load_index(server.url, remote=QUICK), []

    def removed(*args: object, **kwargs: object) -> None:
        if not times:
            shutil.rmtree(cache / "shards")
        times.append(1)
        transfer.download(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr("pipeline.data.remote.fetch.download", removed)
    os.close(index.open(1))
    assert len(times) == 2 and [path.stem for path in shards_kept(cache)] == [index.shards[1].sha256]


def test_a_cache_that_cannot_be_written(server: FaultyServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    index = load_index(server.url, remote=Remote(folder=str(tmp_path / "file")))
    with pytest.raises(UserError, match=r"cannot be kept in .*/file .*data.remote.folder"):
        index.open(0)


def test_the_folder_of_the_cache_may_name_a_variable(
    server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_DISK", str(tmp_path))
    os.close(load_index(server.url, remote=Remote(folder="$LOCAL_DISK/kept")).open(0))
    assert len(list((tmp_path / "kept").glob("*.tar"))) == 1


@pytest.mark.parametrize("folder", ["$NOSUCH/kept", "${NOSUCH}", "/$EMPTY/kept"])
def test_a_folder_of_the_cache_by_a_variable_that_is_not_set(
    server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMPTY", "")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"data.remote.folder=.* the variable (NOSUCH|EMPTY) is not set"):
        load_index(server.url, remote=Remote(folder=folder)).open(0)
    with pytest.raises(UserError, match=r"~nobody-here/kept: there is no such home folder"):
        load_index(server.url, remote=Remote(folder="~nobody-here/kept")).open(0)
    assert sorted(tmp_path.iterdir()) == before


def test_prefetch_brings_what_is_wanted_and_leaves_no_thread(server: FaultyServer, cache: Path) -> None:
    index = load_index(server.url, remote=QUICK)
    server.hurt(NAMES[1], "503")
    ahead = Prefetch(index)
    ahead.want([3, 1])
    while len(shards_kept(cache)) < 2:
        threading.Event().wait(0.01)
    assert [server.asked[name] for name in NAMES] == [0, 2, 0, 1, 0]
    index = load_index(server.url)  # a stall of half a minute
    server.hurt(NAMES[0], "silent", always=True)
    stuck = Prefetch(index)
    stuck.want([0])
    while not server.asked[NAMES[0]]:
        threading.Event().wait(0.01)
    ahead.close()
    stuck.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_little_is_fetched_before_training(local: Index, server: FaultyServer) -> None:
    """One shard is looked into; labels of single rows come from the sidecars beside the shards."""
    index = load_index(server.url)
    check_images(index, Data(size=SIZE, channels=1, conditional=True))
    assert sum(server.asked[name] for name in NAMES) == 1
    split = Split(index.sizes, 1, 2, 0.2)
    plan = split.training()
    assert not plan.whole_shards
    assert label_frequencies(index, plan).tolist() == label_frequencies(local, plan).tolist()
    assert sum(server.asked[name] for name in NAMES) == 1
    options = {"batch": 5, "conditional": True}
    there = [batch.images for batch, _ in heldout_batches(index, split.heldout(), data_of(), **options)]
    here = [batch.images for batch, _ in heldout_batches(local, split.heldout(), data_of(), **options)]
    assert all((a == b).all() for a, b in zip(there, here, strict=True))


@pytest.mark.parametrize("error", ERRORS)
def test_a_folder_without_flock_is_refused_in_one_line(server, cache, monkeypatch, error) -> None:
    def refuse(*_: object) -> None:
        raise OSError(getattr(errno, error), "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UserError, match=r"cannot be kept in \S+ \(no locks here\). Set data.remote.folder"):
        load_index(server.url, remote=QUICK).open(0)
