"""Shards in a bucket of Google Cloud Storage, from a server of this machine."""

from __future__ import annotations

import urllib.parse
import urllib.request
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
from tiny_shards import MakeShards

from pipeline.config import Remote, UserError
from pipeline.data.index import Index, load_index
from pipeline.data.prepare.reindex import build_index
from pipeline.data.reader import Reader
from pipeline.data.remote import transfer

pytest.importorskip("gcsfs")
emulator = pytest.importorskip("gcp_storage_emulator.server")

SIZES = [5, 7, 3]
_numbers = count()


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with emulator.create_server("127.0.0.1", 0, in_memory=True) as server:
        host, port = server._api._httpd.server_address
        yield f"http://{host}:{port}"


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """A new bucket, and no key in the places where Google's tools look: the server asks for none."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", endpoint)
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path / "none"))
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    name = f"bucket-{next(_numbers)}"
    send("POST", f"{endpoint}/storage/v1/b", b'{"name": "%s"}' % name.encode())
    transfer._clients.clear()  # they know the server of another test
    yield name
    transfer._clients.clear()


def send(method: str, url: str, data: bytes | None = None) -> None:
    kind = "application/json" if url.endswith("/b") else "application/octet-stream"
    request = urllib.request.Request(url, data, {"Content-Type": kind}, method=method)
    with urllib.request.urlopen(request, timeout=20) as answer:
        assert answer.status in (200, 204)


def put(endpoint: str, bucket: str, name: str, data: bytes) -> None:
    query = urllib.parse.urlencode({"uploadType": "media", "name": f"faces/{name}"})
    send("POST", f"{endpoint}/upload/storage/v1/b/{bucket}/o?{query}", data)


def upload(index: Index, endpoint: str, bucket: str, *, described: bool) -> str:
    for path in index.root.rglob("*"):
        name = path.relative_to(index.root).as_posix()
        if path.is_file() and (described or name.endswith(".tar")):
            put(endpoint, bucket, name, path.read_bytes())
    return f"gs://{bucket}/faces"


def samples(index: Index) -> list[object]:
    reader = Reader(index, 2)
    found = [reader.read(shard, row) for shard, rows in enumerate(index.sizes) for row in range(rows)]
    reader.close()
    return found


@pytest.mark.parametrize("described", [True, False])
def test_a_bucket_is_a_folder(make_shards: MakeShards, endpoint: str, bucket: str, described: bool) -> None:
    local = load_index(str(make_shards(SIZES, classes=2)))
    url = upload(local, endpoint, bucket, described=described)
    if not described:
        with pytest.raises(UserError, match=rf"no index.json that lists shards in {url}/; .*--index-only"):
            load_index(url)
        build_index(url)
    there = load_index(url)
    assert there.fingerprint == local.fingerprint and there.where == f"{url}/"
    assert samples(there) == samples(local)
    assert load_index(f"{url}/s-000{{0,2}}.tar").sizes == (5, 3)


def test_what_is_not_there_or_not_right(make_shards: MakeShards, endpoint: str, bucket: str) -> None:
    local = load_index(str(make_shards(SIZES)))
    url = upload(local, endpoint, bucket, described=True)
    index = load_index(url, remote=Remote(stall_s=5.0, timeout_s=20.0))
    send("DELETE", f"{endpoint}/storage/v1/b/{bucket}/o/faces%2Fs-0001.tar")
    with pytest.raises(UserError, match=rf"{url}/s-0001.tar does not exist, although index.json lists it"):
        index.open(1)
    data = bytearray((local.root / "s-0002.tar").read_bytes())
    data[600] ^= 1
    put(endpoint, bucket, "s-0002.tar", bytes(data))
    with pytest.raises(UserError, match=rf"{url}/s-0002.tar cannot be fetched: its SHA-256 is"):
        index.open(2)
