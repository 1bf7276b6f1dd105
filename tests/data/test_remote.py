"""Shards at a URL: a stream gives what it gives from the same folder here, whatever the server does."""

from __future__ import annotations

import json
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
from conftest import MakeShards
from faulty_server import FaultyServer, serving
from tiny_shards import SIZE, sample_of

from pipeline.config import Data, Remote, UserError
from pipeline.data.index import Index, build_index, load_index
from pipeline.data.plan import heldout_plan, training_plan
from pipeline.data.prefetch import Prefetch
from pipeline.data.reader import BadSampleError, Reader
from pipeline.data.stream import check_images, heldout_batches, label_frequencies, training_batches

SHARDS = [11, 7, 13, 20, 1]
NAMES = [f"s-{number:04d}.tar" for number in range(len(SHARDS))]
QUICK = Remote(stall_s=0.3, timeout_s=60.0)
SOON = Remote(stall_s=0.3, timeout_s=1.0)


@pytest.fixture
def local(make_shards: MakeShards) -> Index:
    return load_index(str(make_shards(SHARDS, classes=3)))


@pytest.fixture
def server(local: Index) -> Iterator[FaultyServer]:
    with serving(local.root) as server:
        yield server


def consumed(index: Index, workers: int = 0, start: int = 0) -> list[tuple[int, int, int]]:
    """(shard, row, label) of two epochs from a position on."""
    plan = training_plan(index.sizes, 1, 2, 0.0, None, 0)
    stream = training_batches(
        index, plan, start=start, batch_size=8, rank=0, world=1, size=SIZE, channels=1,
        conditional=True, workers=workers,
    )  # fmt: skip
    batches = [next(stream) for _ in range(13)]
    stream.close()
    return [
        (*sample_of(image), label)
        for batch in batches
        for image, label in zip(batch.images.numpy(), batch.labels.tolist(), strict=True)  # type: ignore[union-attr]
    ]


def shards_kept(cache: Path) -> list[Path]:
    return sorted((cache / "shards").glob("*.tar"))


def close_all(files: list[int]) -> None:
    for file in files:
        os.close(file)


@pytest.mark.parametrize(("workers", "start"), [(0, 0), (2, 0), (1, 37)])
def test_the_same_samples_in_the_same_order(
    local: Index, server: FaultyServer, workers: int, start: int
) -> None:
    index = load_index(server.url)
    assert index.fingerprint == local.fingerprint and index.where == f"{server.url}/"
    assert consumed(index, workers, start) == consumed(local, 0, start)
    assert {name: server.asked[name] for name in NAMES} == dict.fromkeys(NAMES, 1)


FAULTS = (
    "silent",
    "stall",
    "cut",
    "says less",
    "says more",
    "ends early",
    "endless",
    "flipped",
    "503",
)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes_costs_another_request(local: Index, server: FaultyServer, fault: str) -> None:
    index = load_index(server.url, remote=QUICK)
    server.hurt(NAMES[2], fault)
    reader, here = Reader(index, 2), Reader(local, 2)
    assert [reader.read(2, row) for row in range(13)] == [here.read(2, row) for row in range(13)]
    reader.close()
    here.close()
    assert server.asked[NAMES[2]] == 2


def test_a_stream_through_all_faults(local: Index, server: FaultyServer) -> None:
    server.hurt("index.json", "503", "cut")
    said: list[str] = []
    index = load_index(server.url, said.append, QUICK)
    assert len(said) == 1 and "index.json" in said[0] and "HTTP 503; trying again" in said[0]
    for number, fault in enumerate(FAULTS):
        server.hurt(NAMES[number % len(NAMES)], fault)
    assert consumed(index, workers=1) == consumed(local)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("silent", "nothing came for 0.3 s, after 0 bytes"),
        ("stall", r"nothing came for 0.3 s, after [1-9][\d,]* bytes"),
        ("503", "the server answers with HTTP 503"),
        ("cut", "ContentLengthError|ClientPayloadError"),
    ],
)
def test_a_fault_that_stays_ends_in_one_message_in_time(
    server: FaultyServer, fault: str, reason: str
) -> None:
    index = load_index(server.url, remote=SOON)
    server.hurt(NAMES[2], fault, always=True)
    with pytest.raises(UserError, match=rf"{NAMES[2]} could not be fetched in 1 s .*{reason}") as caught:
        consumed(index)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fault", "reason", "requests"),
    [
        ("flipped", r"SHA-256 is [0-9a-f]+…, not the [0-9a-f]+… .* run `shardgan prepare --index-only`", 2),
        ("ends early", r"has [\d,]+ bytes, not the [\d,]+ that index.json says", 2),
        ("says more", r"more than the [\d,]+ bytes", 2),
        ("endless", r"more than the [\d,]+ bytes", 2),
        ("404", "although index.json lists it", 1),
        ("403", r"not allowed \(403\).*netrc", 1),
        ("410", "HTTP 410", 1),
    ],
)
def test_what_no_patience_mends_is_said_at_once(
    server: FaultyServer, cache: Path, fault: str, reason: str, requests: int
) -> None:
    index = load_index(server.url, remote=QUICK)
    server.hurt(NAMES[2], fault, always=True)
    with pytest.raises(UserError, match=rf"/{NAMES[2]} .*{reason}"):
        index.open(2)
    assert server.asked[NAMES[2]] == requests
    assert not [path for path in (cache / "shards").iterdir() if path.name != ".lock"]


def test_nobody_there(local: Index) -> None:
    with serving(local.root) as server:
        url = server.url
    with pytest.raises(UserError, match=rf"{url}/index.json could not be fetched in 1 s .*Connect"):
        load_index(url, remote=SOON)


def test_without_an_index_one_is_built_here(local: Index, server: FaultyServer, cache: Path) -> None:
    (local.root / "index.json").unlink()
    with pytest.raises(UserError, match=rf"no index.json .*--index-only '{server.url}'"):
        load_index(server.url)
    said: list[str] = []
    built = build_index(server.url, said.append)
    assert said == [f"Fetching and indexing 5 shards of {server.url}/ …"]
    assert built.shards == local.shards and load_index(server.url) == built
    assert consumed(built) == consumed(local)
    assert {name: server.asked[name] for name in NAMES} == dict.fromkeys(NAMES, 1)
    assert len(shards_kept(cache)) == 5


@pytest.mark.parametrize("query", ["", "token=zxzxzx&of=me"])
def test_a_listing_gives_the_names(local: Index, server: FaultyServer, query: str) -> None:
    """Of what lies in the folder itself: neither of folders in it nor of what its page points to."""
    (local.root / "index.json").unlink()
    shutil.copytree(local.root, local.root / "deeper.tar")
    (local.root / NAMES[0]).rename(local.root / "a b#c?.tar")
    server.query = query or None
    url = f"{server.url}/?{query}" if query else server.url
    assert [shard.url for shard in build_index(url).shards] == ["a b#c?.tar", *NAMES[1:]]
    assert load_index(url).num_samples == local.num_samples


def test_an_index_that_says_too_little(local: Index, server: FaultyServer) -> None:
    record = json.loads((local.root / "index.json").read_text())
    record["shardlist"] = [{"url": entry["url"], "nsamples": 3} for entry in record["shardlist"]]
    (local.root / "index.json").write_text(json.dumps(record))
    with pytest.raises(
        UserError, match=r"SHA-256 and labels of s-0000.tar and 4 other shards; `shardgan prep"
    ):
        load_index(server.url)
    record["shardlist"][0] |= {"filesize": 1, "labels": {}, "sha256": "../../../" + "a" * 55}
    (local.root / "index.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"s-0000.tar and 4 other"):
        load_index(server.url)


def test_a_broken_shard_is_not_indexed(local: Index, server: FaultyServer, cache: Path) -> None:
    data = (local.root / NAMES[1]).read_bytes()
    (local.root / NAMES[1]).write_bytes(data[:1536])
    with pytest.raises(UserError, match=rf"shard {server.url}/{NAMES[1]}, byte 1536: truncated"):
        build_index(server.url)
    assert not list(cache.rglob("index.json"))


def test_brace_lists_and_single_shards(local: Index, server: FaultyServer) -> None:
    some = load_index(f"{server.url}/s-{{0001..0003}}.tar")
    assert some.shards == local.shards[1:4] and not server.asked[NAMES[0]]
    assert load_index(f"{server.url}/s-0004.tar").sizes == (1,)
    with pytest.raises(UserError, match=r"labels of s-0005.tar;"):
        load_index(f"{server.url}/s-{{0004..0005}}.tar")


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("ftp://host/x.tar", "not at an http"),
        ("https://", "no URL to fetch from|give the URL"),
        ("https://host:port/x", "write / .* as %2F"),
        ("https://me:pa/ss@host/x", "https://host/x is no URL"),
        ("https://host/*.tar", "brace list"),
        ("s3://bucket/a?b.tar", "brace list"),
        ("s3:///x.tar", "give the URL"),
        ("https://{a,b}/x.tar", "one folder"),
        ("https://host/{a,b}", "one folder"),
        ("https://host/{a.tar,b.tgz}", "one folder"),
        ("https://host/{a", "not a brace list"),
    ],
)
def test_urls_that_are_none(train: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_index(train)
    assert "pa/ss" not in str(caught.value) and "me:" not in str(caught.value)


def test_credentials_open_doors_and_are_never_shown(
    local: Index, server: FaultyServer, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    server.login, server.query = "jane.doe:hush:hush", "X-Amz-Signature=zxzx%2F"
    host = server.url.removeprefix("http://")
    good = f"http://jane.doe:hush%3Ahush@{host}/{{s-0000,s-0001}}.tar?X-Amz-Signature=zxzx%2F"
    said: list[str] = []
    index = load_index(good, said.append, SOON)
    assert consumed(index) and index.where == f"{server.url}/"
    (local.root / "index.json").unlink()
    server.hurt(NAMES[0], "503")
    build_index(good, said.append, remote=QUICK)
    messages = []
    for url, status in ((good, 503), (good.replace("hush%3A", "hash"), 403), (good.replace("zx", "xz"), 403)):
        server.hurt(NAMES[2], str(status), always=True)
        with pytest.raises(UserError, match=str(status)) as caught:
            build_index(url.replace("s-0001", "s-0002"), said.append, remote=SOON)
        messages.append(str(caught.value))
    written = [f"{path}\n{path.read_bytes()!r}" for path in cache.rglob("*.*") if path.is_file()]
    shown = "\n".join([*messages, *said, *written, repr(index), *capfd.readouterr()])
    assert server.url in shown
    for secret in ("jane", "doe", "hush", "hash", "Signature", "zxz", "xzx"):
        assert secret not in shown, secret


def test_netrc(local: Index, server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.login = "someone:secret"
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login someone password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert load_index(server.url).shards == local.shards


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
    with pytest.raises(BadSampleError, match=rf"wrong CRC\). Remove {kept}, and it is fetched again"):
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
    split = (index.sizes, 1, 2, 0.2, None, 0)
    plan = training_plan(*split)
    assert not plan.whole_shards
    assert label_frequencies(index, plan).tolist() == label_frequencies(local, plan).tolist()
    assert sum(server.asked[name] for name in NAMES) == 1
    options = {"batch": 5, "rank": 0, "world": 1, "size": SIZE, "channels": 1, "conditional": True}
    there = [batch.images for batch, _ in heldout_batches(index, heldout_plan(*split), **options)]
    here = [batch.images for batch, _ in heldout_batches(local, heldout_plan(*split), **options)]
    assert all((a == b).all() for a, b in zip(there, here, strict=True))
