"""Shards in a bucket, by the S3 protocol, from a server of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer
from tiny_shards import MakeShards

from pipeline.config import Remote, UserError
from pipeline.data.index import Index, load_index
from pipeline.data.prepare.reindex import build_index
from pipeline.data.reader import Reader
from pipeline.data.remote import transfer

SIZES = [5, 7, 3]
_numbers = count()


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """A new bucket for which this machine has the key, in the places where AWS's tools look."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "something")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    name = f"bucket-{next(_numbers)}"
    boto3.client("s3").create_bucket(Bucket=name)
    yield name


def upload(index: Index, bucket: str, *, described: bool) -> str:
    for path in index.root.rglob("*"):
        name = path.relative_to(index.root).as_posix()
        if path.is_file() and (described or name.endswith(".tar")):
            boto3.client("s3").upload_file(str(path), bucket, f"faces/{name}")
    return f"s3://{bucket}/faces"


def samples(index: Index) -> list[object]:
    reader = Reader(index, 2)
    found = [reader.read(shard, row) for shard, rows in enumerate(index.sizes) for row in range(rows)]
    reader.close()
    return found


@pytest.mark.parametrize("described", [True, False])
def test_a_bucket_is_a_folder(make_shards: MakeShards, bucket: str, described: bool) -> None:
    local = load_index(str(make_shards(SIZES, classes=2)))
    url = upload(local, bucket, described=described)
    if not described:
        with pytest.raises(UserError, match=rf"no index.json that lists shards in {url}/; .*--index-only"):
            load_index(url)
        build_index(url)
    there = load_index(url)
    assert there.fingerprint == local.fingerprint and there.where == f"{url}/"
    assert samples(there) == samples(local)
    assert load_index(f"{url}/s-000{{0,2}}.tar").sizes == (5, 3)


def test_what_is_not_there_or_not_right(make_shards: MakeShards, bucket: str) -> None:
    local = load_index(str(make_shards(SIZES)))
    url = upload(local, bucket, described=True)
    index = load_index(url, remote=Remote(stall_s=5.0, timeout_s=20.0))
    boto3.client("s3").delete_object(Bucket=bucket, Key="faces/s-0001.tar")
    with pytest.raises(UserError, match=rf"{url}/s-0001.tar does not exist, although index.json lists it"):
        index.open(1)
    data = bytearray((local.root / "s-0002.tar").read_bytes())
    data[600] ^= 1
    boto3.client("s3").put_object(Bucket=bucket, Key="faces/s-0002.tar", Body=bytes(data))
    with pytest.raises(UserError, match=rf"{url}/s-0002.tar cannot be fetched: its SHA-256 is"):
        index.open(2)
    with pytest.raises(UserError, match=r"s3://no-such/faces/index.json cannot be fetched: .*no such bucket"):
        load_index("s3://no-such/faces")


def test_without_a_key(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    transfer._clients.clear()  # it has looked for its key already
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(UserError, match=rf"s3://{bucket}/x/index.json cannot be fetched: not allowed .*AWS"):
        load_index(f"s3://{bucket}/x", remote=Remote(timeout_s=20.0))
    transfer._clients.clear()
