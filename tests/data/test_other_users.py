"""What users of one machine share: the cache of remote shards, that of indexes, a folder of shards."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny_shards import MakeShards

from pipeline.config import Remote, UserError
from pipeline.data.index import load_index
from pipeline.data.record import Shard, places, sidecar_list
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


@pytest.mark.parametrize("closed", ["index", "index/*", "index/*/.shardgan"])
def test_a_cache_of_indexes_that_may_not_be_looked_into_is_as_if_empty(
    make_shards: MakeShards, cache: Path, closed: str
) -> None:
    root = make_shards([3])
    index = load_index(str(root))
    place = places(root)[1]
    (place / ".shardgan").mkdir(parents=True)
    cache.chmod(0o755)
    (found,) = cache.glob(closed)
    found.chmod(0o700)

    def look() -> None:
        assert load_index(str(root)) == index
        assert sidecar_list(root)("s-0000.tar") and not sidecar_list(root)("s-0001.tar")

    assert as_user(JOE, look, root, cache) == ""


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o600])
def test_who_may_read_a_shard_may_read_what_is_written_beside_it(make_shards: MakeShards, mode: int) -> None:
    """Whatever the umask of the one who was first to look at it."""
    root = make_shards([3, 2])
    for shard in root.glob("*.tar"):
        shard.chmod(mode)
    os.umask(0o077)
    load_index(str(root))
    folder = root / ".shardgan"
    for path in (root / "index.json", *(folder / f"s-000{number}.tar.npz" for number in (0, 1))):
        assert stat.S_IMODE(path.stat().st_mode) == mode, path
    assert stat.S_IMODE(folder.stat().st_mode) == {0o644: 0o755, 0o640: 0o750, 0o600: 0o700}[mode]


def test_links_that_others_put_into_a_cache_are_not_followed(tmp_path: Path) -> None:
    """Neither to make a file of ours, nor to write to one."""
    kept, ours = tmp_path / "kept", tmp_path / "ours"
    kept.mkdir()
    ours.write_text("precious")
    (kept / ".lock").symlink_to(tmp_path / "new")
    cache, shard = ShardCache(kept, 2000), SHARDS[0]
    fetch = lambda part: part.write_bytes(bytes(1000))  # noqa: E731
    for target in (tmp_path / "new", ours):
        (kept / ".lock").unlink()
        (kept / ".lock").symlink_to(target)
        with pytest.raises(UserError, match="Remote shards cannot be kept in"):
            cache.open(shard, fetch, Patience(Remote(timeout_s=2.0)))
    (kept / ".lock").unlink()
    (kept / f"{shard.sha256}.{shard.filesize}.part").symlink_to(ours)
    os.close(cache.open(shard, fetch, Patience(Remote(timeout_s=2.0))))
    assert ours.read_text() == "precious" and stat.S_IMODE(ours.stat().st_mode) == 0o644
    assert not (tmp_path / "new").exists() and cache.path(shard).stat().st_size == 1000
