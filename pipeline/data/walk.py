"""Reading whole shards to note what is in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TypeVar

from pipeline.config import UserError
from pipeline.data import sidecar
from pipeline.data.record import INDEX, REBUILD, Shard, sidecar_path, write_somewhere

_T = TypeVar("_T")
_TELL_EVERY_S = 10.0


def in_threads(
    walk: Callable[[_T], Shard], items: Sequence[_T], announce: Callable[[str], None], at_once: int
) -> tuple[Shard, ...]:
    """`walk` of every item, several at once.

    In threads: hashing and reading, where the time goes for all but tiny images, let go of the interpreter,
    and threads are safe to start whatever else (CUDA, a process group) the process has begun.
    """
    with ThreadPoolExecutor(max_workers=at_once) as pool:
        futures = [pool.submit(walk, item) for item in items]
        try:
            _tell_progress(futures, announce)
            return tuple(future.result() for future in futures)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _tell_progress(futures: Sequence[Future[Shard]], announce: Callable[[str], None]) -> None:
    """A line now and then while it lasts, and an early end when one fails."""
    pending: set[Future[Shard]] = set(futures)
    while pending:
        done, pending = wait(pending, _TELL_EVERY_S, return_when=FIRST_EXCEPTION)
        if any(future.exception() for future in done):
            return
        if pending:
            announce(f"  {len(futures) - len(pending)} of {len(futures)} shards indexed")


def scan_shard(root: Path, url: str, filesize: int, sha256: str | None) -> sidecar.SampleTable:
    """Walk one shard and write its sidecar. Raises UserError if it is not whole, or not the one expected."""
    try:
        table = sidecar.scan(root / url, url)
    except OSError as error:
        raise UserError(f"shard {url} in {root} cannot be read: {error.strerror or error}.") from None
    sidecar.check(table, url, filesize, sha256)
    write_somewhere(root, lambda place: sidecar.save(table, sidecar_path(place, url)))
    return table


def file_size(root: Path, url: str) -> int:
    try:
        return (root / url).stat().st_size
    except FileNotFoundError:
        raise UserError(
            f"shard {url} is missing from {root}, although {INDEX} lists it. Fetch it again, or, if it was "
            f"removed on purpose, {REBUILD}."
        ) from None
    except OSError as error:
        raise UserError(f"shard {url} in {root} cannot be read: {error.strerror or error}.") from None
