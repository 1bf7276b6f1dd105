"""What users of one machine share: the cache of remote shards."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.config import Remote
from pipeline.data.record import Shard
from pipeline.data.remote.shard_cache import ShardCache
from pipeline.data.remote.transfer import Patience

JANE, JOE = 65533, 65534
SHARDS = [Shard(f"{name}.tar", 1, 1000, name * 64, {}) for name in "abc"]


@pytest.fixture(autouse=True)
def umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def as_user(user: int, call: Callable[[], object], *folders: Path) -> str:
    """What a process of this user raises; it can reach the folders, if not more."""
    if os.geteuid() != 0:
        pytest.skip("only root can be several users")
    for folder in folders:
        for parent in folder.parents[: folder.parents.index(Path(tempfile.gettempdir()))]:
            parent.chmod(0o755)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:  # with the modules that are imported, which others may not read
        try:
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
            call()
        except BaseException as error:
            os.write(writing, repr(error).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as said:
        text = said.read()
    os.waitpid(child, 0)
    return text


@pytest.mark.parametrize("mode", [0o777, 0o1777])
def test_users_share_a_cache_of_shards(tmp_path: Path, mode: int) -> None:
    """Also if its bound is reached with shards that only the other one may remove, in a sticky folder."""
    kept = tmp_path / "kept"
    kept.mkdir()
    kept.chmod(mode)
    cache = ShardCache(kept, 2000)

    def use(*shards: Shard) -> None:
        for shard in shards:
            fetch = lambda part: part.write_bytes(bytes(1000))  # noqa: E731
            os.close(cache.open(shard, fetch, Patience(Remote(timeout_s=60.0))))

    assert as_user(JANE, lambda: use(*SHARDS[:2]), kept) == ""
    assert as_user(JOE, lambda: use(SHARDS[1], SHARDS[2]), kept) == ""
    assert as_user(JANE, lambda: use(SHARDS[2]), kept) == ""
    assert stat.S_IMODE((kept / ".lock").stat().st_mode) == 0o666
    names = sorted(path.name[:1] for path in kept.glob("*.tar"))
    assert names == (["a", "b", "c"] if mode & stat.S_ISVTX else ["b", "c"])
