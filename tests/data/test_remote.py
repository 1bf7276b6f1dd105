"""Shards at a URL: a stream gives what it gives from the same folder here, whatever the server does."""

from __future__ import annotations

import json
import os
import shutil
import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import pytest
from faulty_server import MOVED, FaultyServer, serving
from remote_shards import NAMES, QUICK, SOON, consumed, shards_kept

from pipeline.config import Remote, UserError
from pipeline.data.index import Index, load_index
from pipeline.data.prepare import reindex
from pipeline.data.prepare.reindex import build_index
from pipeline.data.reader import Reader
from pipeline.data.record import sidecar_path
from pipeline.data.remote.fetch import RemoteShards
from pipeline.data.remote.urls import RemoteFolder


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
def test_a_fault_that_passes_costs_another_request_and_is_said(
    local: Index, server: FaultyServer, capfd: pytest.CaptureFixture[str], fault: str
) -> None:
    index = load_index(server.url, remote=QUICK)
    server.hurt(NAMES[2], fault)
    reader, here = Reader(index, 2), Reader(local, 2)
    assert [reader.read(2, row) for row in range(13)] == [here.read(2, row) for row in range(13)]
    reader.close()
    here.close()
    assert server.asked[NAMES[2]] == 2
    warnings = capfd.readouterr().err.splitlines()
    assert len(warnings) == 1 and warnings[0].startswith(f"warning: {server.url}/{NAMES[2]}: ")
    assert warnings[0].endswith("; trying again for up to 60 s …")


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
        ("cut", r"the transfer broke off \((ContentLengthError|ClientPayloadError)\)"),
    ],
)
def test_a_fault_that_stays_ends_in_one_message_in_time(
    server: FaultyServer, fault: str, reason: str
) -> None:
    index = load_index(server.url, remote=SOON)
    server.hurt(NAMES[2], fault, always=True)
    with pytest.raises(UserError, match=rf"{NAMES[2]} could not be fetched in 2 s .*{reason}") as caught:
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
        ("moved", "redirects without end", 10),
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


def test_a_server_that_does_not_say_what_is_not_there(local: Index, server: FaultyServer) -> None:
    """As S3 to those who may not list a bucket: 403 for any file that is not there."""
    server.hurt("index.json", "403", always=True)
    server.hurt("", "403", always=True)
    with pytest.raises(UserError, match=r"not allowed \(403\).* not there; then .*--index-only"):
        load_index(server.url)
    with pytest.raises(UserError, match=rf"not allowed \(403\).* only listing .* list: {server.url}/\{{0"):
        build_index(server.url)
    listed = f"{server.url}/s-{{0000..{len(NAMES) - 1:04d}}}.tar"
    build_index(listed)
    assert load_index(listed).fingerprint == local.fingerprint


def test_nobody_there(local: Index) -> None:
    with serving(local.root) as server:
        url = server.url
    with pytest.raises(UserError, match=rf"{url}/index.json could not be fetched in 2 s .*Connect"):
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


def test_an_index_of_listed_shards_is_none_of_the_folder(local: Index, server: FaultyServer) -> None:
    few = f"{server.url}/{{{','.join(Path(name).stem for name in NAMES[:2])}}}.tar"
    assert build_index(few).shards == load_index(few).shards == local.shards[:2]
    assert load_index(server.url).shards == local.shards, "by the server's own"
    (local.root / "index.json").unlink()
    assert load_index(few).shards == local.shards[:2]
    with pytest.raises(UserError, match=rf"no index.json .*--index-only '{server.url}'"):
        load_index(server.url)
    other = f"{server.url}/{NAMES[3]}"
    build_index(other)
    assert load_index(few).shards == local.shards[:2], "kept beside those of another list"
    built = build_index(server.url)
    build_index(few)
    assert load_index(server.url).shards == built.shards == local.shards


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


def test_what_the_folders_index_says_of_the_whole_is_kept(local: Index, server: FaultyServer) -> None:
    """Of one that says too little of its shards; one that cannot be read is made anew."""
    path = local.root / "index.json"
    path.write_text(
        json.dumps({"name": "pets", "classes": ["cat", "dog"], "license": "CC0", "shardlist": []})
    )
    with pytest.raises(UserError, match="lists shards"):
        load_index(server.url)
    for train in (f"{server.url}/{NAMES[0]}", server.url):
        build_index(train)
        index = load_index(train)
        assert (index.name, index.class_names, index.license) == ("pets", ("cat", "dog"), "CC0")
    path.write_text("{")
    said: list[str] = []
    assert build_index(server.url, said.append).shards == local.shards
    assert any("index.json" in line and line.endswith("A new one is made here.") for line in said)


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
        ("file:///data/faces", "without file://"),
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
        ("https://host/d/..%2F..%2Fx.tar", "leads out of its folder"),
        ("https://host/d/{a,..%2Fb}.tar", "leads out of its folder"),
        ("https://host/d/a%1b%5b2J.tar", "cannot be shown"),
    ],
)
def test_urls_that_are_none(train: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_index(train)
    assert "pa/ss" not in str(caught.value) and "me:" not in str(caught.value)


def test_index_json_stands_for_its_folder(local: Index, server: FaultyServer) -> None:
    assert load_index(f"{server.url}/index.json").shards == local.shards


def test_a_redirect_is_followed_to_the_letter(local: Index, server: FaultyServer) -> None:
    """A signature counts bytes, whatever stands for them."""
    index = load_index(server.url, remote=QUICK)
    server.hurt(NAMES[1], "moved")
    os.close(index.open(1))
    assert f"/{NAMES[1]}?{MOVED}" in server.paths


def test_a_sidecar_that_cannot_be_fetched_makes_nobody_wait(local: Index, server: FaultyServer) -> None:
    """The shard is here, and others may be waiting for it."""
    index = load_index(server.url, remote=QUICK)
    name = str(sidecar_path(Path(), NAMES[1]))
    server.hurt(name, "503", always=True)
    os.close(index.open(1))
    assert server.asked[name] == 1
    assert index.table(1).label.tolist() == local.table(1).label.tolist()


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


@pytest.mark.parametrize(
    "name",
    [
        "d%2F..%2F..%2Fx.tar", "%2Fetc%2Fx.tar", "..%2Fx.tar", "d%2Fx.tar", "..", "d/x.tar", "a%5Cb.tar",
        "a%0Ab.tar", "a%1b%5d0;x%07.tar", "a%C2%9B.tar", "%E2%80%AEx.tar", "a%00.tar",
    ],
)  # fmt: skip
def test_a_listing_names_plain_files_alone(name: str) -> None:
    assert RemoteFolder("http", "host/d/").name(f"http://host/d/{name}") is None


def test_a_key_of_a_bucket_is_a_plain_name() -> None:
    folder = RemoteFolder("s3", "bucket/d/")
    assert folder.name("bucket/d/a%2Fb.tar") == "a%2Fb.tar"
    assert folder.name("bucket/d/../x.tar") is folder.name("bucket/d/a\x1b[2J.tar") is None


@pytest.mark.parametrize("name", ["../x.tar", "/x.tar", "a\x1b.tar", ""])
def test_no_file_is_written_for_an_unfit_name(tmp_path: Path, cache: Path, name: str) -> None:
    shards = RemoteShards(RemoteFolder("http", "localhost:1/d/"), Remote(timeout_s=1.0))
    with pytest.raises(UserError, match="cannot be the name of a shard"):
        shards.index(name, print)
    with pytest.raises(UserError, match="cannot be the name of a shard"):
        sidecar_path(tmp_path, name)
    assert not list(cache.glob("*"))


def test_two_parts_of_a_folder_that_are_indexed_at_once(
    local: Index, server: FaultyServer, monkeypatch
) -> None:
    """By two jobs of an array: each adds its part to what the other has found."""
    (local.root / "index.json").unlink()
    read, other = reindex.read_record, ThreadPoolExecutor(1)
    began = threading.Event()
    waiting: list[Future[Index]] = []

    def second() -> Index:
        began.set()
        return build_index(f"{server.url}/s-{{0002..0004}}.tar", remote=QUICK)

    def read_while_the_other_indexes(home: Path) -> dict[str, object]:
        before = read(home)
        if not waiting:
            waiting.append(other.submit(second))
            assert began.wait(30)
            wait(waiting, timeout=2)  # without turns it would be ready before this one writes
        return before

    monkeypatch.setattr(reindex, "read_record", read_while_the_other_indexes)
    build_index(f"{server.url}/s-{{0000..0001}}.tar", remote=QUICK)
    assert len(waiting[0].result(60).shards) == 3
    index = load_index(f"{server.url}/s-{{0000..0004}}.tar", remote=QUICK)
    assert index.num_samples == local.num_samples
    assert [p.name for p in index.root.parent.iterdir()] == [index.root.name]
