"""Whole files from https://, s3:// and gs://: watched, retried, and given up after a stated time.

fsspec speaks the protocols. The rest is decided here, in one way for all: a stalled transfer is stopped,
passing errors are retried at growing intervals, others are raised at once, and nothing takes longer than
`data.remote.timeout_s`.
"""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from copy import copy
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.callbacks import Callback

from pipeline.config import Remote, UserError
from pipeline.credentials import scrubbed
from pipeline.data.remote.disk import disk_named, linked, scratch_folder
from pipeline.data.remote.urls import RemoteFolder

_T = TypeVar("_T")

_LOOK_S = 0.1  # how often a transfer is looked at
_BRIEF_S = 10.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 30.0
_PASSING = (400, 408, 425, 429)  # client errors worth another try; 400 is also an answer aiohttp cannot parse
_BROKEN = ("ClientPayloadError", "ContentLengthError", "ServerDisconnectedError")  # aiohttp's
_CACHE = "see data.remote.folder and data.remote.gb"
_REMOVING = ("gs",)  # whose library removes what it fails to fetch
_PACKAGES = {"s3": "'shardgan[s3]'", "gs": "'shardgan[gcs]'"}


class StoppedError(Exception):
    """Nobody waits for this transfer any more."""


class DeniedError(UserError):
    """The server does not let us have a file. Some say so of a file that is not there."""


class WrongBytesError(Exception):
    """What has arrived is not the wanted file."""


class _StalledError(Exception):
    """A transfer that was stopped because nothing came."""


class _OverError(Exception):
    """A transfer that was stopped because its time was over."""


class Patience:
    """How long to try: a deadline, a number of attempts, an event that ends it early."""

    def __init__(
        self, settings: Remote, stop: threading.Event | None = None, attempts: int | None = None
    ) -> None:
        self.attempts = attempts
        self.stall_s, self.timeout_s = settings.stall_s, settings.timeout_s
        self.deadline = time.monotonic() + settings.timeout_s
        self._stop = stop or threading.Event()

    def brief(self) -> Patience:
        """For what one can do without: one attempt of a few seconds."""
        other = copy(self)
        other.attempts, other.deadline = 1, min(self.deadline, time.monotonic() + _BRIEF_S)
        return other

    @property
    def over(self) -> bool:
        return time.monotonic() >= self.deadline

    def pause(self, seconds: float) -> None:
        """Raises StoppedError if the event is set."""
        if self._stop.wait(min(seconds, max(0.0, self.deadline - time.monotonic()))):
            raise StoppedError

    def check(self) -> None:
        if self._stop.is_set():
            raise StoppedError
        if self.over:
            raise _OverError


def download(
    folder: RemoteFolder,
    name: str,
    target: Path,
    patience: Patience,
    *,
    most: int | None,
    check: Callable[[], None] = lambda: None,
    tell: Callable[[str], None] = lambda _: None,
    advice: str = _CACHE,
) -> None:
    """Fetch one file, of at most so many bytes, into `target`; `check` may raise WrongBytesError afterwards.

    Raises UserError, naming the file and what was wrong (with `advice` if that is the disk of `target`),
    DeniedError if we may not have it,
    FileNotFoundError if the server has no such file, and StoppedError.
    """
    what = folder.show(name)

    def checked() -> None:
        with disk_named(what, advice):
            check()

    # Under another name if it may be removed, since `target` may be open and locked.
    with scratch_folder() if folder.scheme in _REMOVING else nullcontext() as scratch:

        async def get(filesystem: Any, progress: Callback) -> None:
            path = linked(scratch / "link", target) if scratch else target
            with disk_named(what, advice):
                await filesystem._get_file(folder.url(name), str(path), callback=progress)

        _persist(folder, name, get, patience, most, checked, tell)


def read(
    folder: RemoteFolder,
    name: str,
    patience: Patience,
    *,
    most: int,
    tell: Callable[[str], None] = lambda _: None,
) -> bytes:
    """The contents of a small file. Raises as download does."""
    with scratch_folder() as scratch:
        target = scratch / "file"
        advice = f"set TMPDIR ({scratch.parent}) to a folder on a disk with room"
        download(folder, name, target, patience, most=most, tell=tell, advice=advice)
        with disk_named(folder.show(name), advice):
            return target.read_bytes()


def names_in(folder: RemoteFolder, patience: Patience, tell: Callable[[str], None]) -> set[str]:
    """What the server lists in the folder. Raises as download does."""
    url = folder.url("")

    async def ls(filesystem: Any, _: Callback) -> list[str]:
        listed: list[str] = await filesystem._ls(url, detail=False)
        return listed

    listed = _persist(folder, "", ls, patience, None, lambda: None, tell)
    return {name for entry in listed if (name := folder.name(entry))}


def _persist(
    folder: RemoteFolder,
    name: str,
    operation: Callable[[Any, Callback], Awaitable[_T]],
    patience: Patience,
    most: int | None,
    check: Callable[[], None],
    tell: Callable[[str], None],
) -> _T:
    """Repeat until it succeeds, cannot succeed, or time is over."""
    what = folder.show(name)
    problem = ""
    wrong: set[str] = set()
    for attempt in count(1):
        try:
            result = _once(folder.scheme, operation, patience, most)
            check()
            return result
        except (StoppedError, UserError):
            raise
        except FileNotFoundError as error:
            if "bucket does not exist" in str(error):  # S3's words
                raise UserError(f"{what} cannot be fetched: there is no such bucket.") from None
            raise FileNotFoundError(f"{what} does not exist") from None
        except _OverError:
            problem, again = problem or "not all of it had come", True
        except WrongBytesError as error:
            problem, again = str(error), str(error) not in wrong
            wrong.add(problem)
        except Exception as error:  # whatever a protocol's library raises
            problem, again = _problem(error)
            if _is_denial(error):
                raise DeniedError(f"{what} cannot be fetched: {problem}.") from None
        if not again:
            raise UserError(f"{what} cannot be fetched: {problem}.")
        if attempt == 1:
            tell(f"{what}: {problem}; trying again for up to {patience.timeout_s:g} s …")
        last = attempt == patience.attempts
        if not last:  # at a random moment, unlike other ranks
            pause = min(_FIRST_PAUSE_S * 2**attempt, _LONGEST_PAUSE_S)
            patience.pause(pause * random.SystemRandom().uniform(0.5, 1))
        if last or patience.over:
            raise UserError(
                f"{what} could not be fetched in {patience.timeout_s:g} s (data.remote.timeout_s), after "
                f"{attempt} attempt{'s' * (attempt > 1)}: {problem}."
            )
    raise AssertionError


def _once(
    scheme: str, operation: Callable[[Any, Callback], Awaitable[_T]], patience: Patience, most: int | None
) -> _T:
    client = _client(scheme)
    return asyncio.run_coroutine_threadsafe(
        _watched(client, operation, patience, most), client.filesystem.loop
    ).result()


async def _watched(
    client: _Client,
    operation: Callable[[Any, Callback], Awaitable[_T]],
    patience: Patience,
    most: int | None,
) -> _T:
    progress = _Progress(most)

    async def work() -> _T:
        await client.connect()
        return await operation(client.filesystem, progress)

    task = asyncio.create_task(work())
    seen, since = 0, time.monotonic()
    try:
        while not (await asyncio.wait({task}, timeout=_LOOK_S))[0]:
            patience.check()
            if progress.value > seen:
                seen, since = progress.value, time.monotonic()
            elif time.monotonic() - since > patience.stall_s:
                raise _StalledError(f"nothing came for {patience.stall_s:g} s, after {seen:,} bytes")
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=1)
        if task.done() and not task.cancelled():
            task.exception()  # retrieved, or asyncio would warn


class _Progress(Callback):  # type: ignore[misc]
    """Counts the bytes that arrive. Raises WrongBytesError if there are too many."""

    def __init__(self, most: int | None) -> None:
        super().__init__()
        self._most = most

    def relative_update(self, inc: int = 1) -> None:
        super().relative_update(inc)
        if self._most is not None and self.value > self._most:
            raise WrongBytesError(f"it has more than the {self._most:,} bytes it should have")


class _Client:
    """One protocol's connections in one process."""

    def __init__(self, scheme: str) -> None:
        self.filesystem = _filesystem(scheme)
        self._connecting = asyncio.Lock()

    async def connect(self) -> None:
        """Only once, even if several transfers begin at the same time."""
        if hasattr(self.filesystem, "set_session"):
            async with self._connecting:
                await self.filesystem.set_session()


_clients: dict[tuple[str, int], _Client] = {}


def _client(scheme: str) -> _Client:
    """One per protocol and process: connections do not survive a fork."""
    key = (scheme, os.getpid())
    return _clients.get(key) or _clients.setdefault(key, _Client(scheme))


def _filesystem(scheme: str) -> Any:
    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if scheme in ("http", "https"):
        import aiohttp

        # No limit to a whole transfer, which is watched; proxies and ~/.netrc as for curl; URLs as they
        # are, those of redirects too, since a signature may hold any character.
        options["encoded"] = True
        options["client_kwargs"] = {
            "timeout": aiohttp.ClientTimeout(total=None),
            "trust_env": True,
            "requote_redirect_url": False,
        }
    if scheme == "s3":
        options["max_concurrency"] = 1  # else a file comes in parts of 50 MB, and looks stalled in between
    try:
        return fsspec.filesystem(scheme, **options)
    except ImportError:
        raise UserError(
            f"{scheme}:// needs another package: pip install {_PACKAGES.get(scheme, scheme)}"
        ) from None


def _status(error: Exception) -> Any:
    return next((vars(error)[name] for name in ("status", "code") if name in vars(error)), None)


def _is_denial(error: Exception) -> bool:
    return (
        isinstance(error, PermissionError)
        or _status(error) in (401, 403)
        or "Credentials" in type(error).__name__
    )


def _problem(error: Exception) -> tuple[str, bool]:
    """What went wrong, without credentials, and whether to retry."""
    name, text, status = type(error).__name__, scrubbed(" ".join(str(error).split())), _status(error)
    if isinstance(error, _StalledError):
        return text, True
    if _is_denial(error):
        return (
            f"not allowed ({status or text}). Credentials come from the URL or ~/.netrc (https), or from "
            "where the tools of AWS and Google Cloud look for them"
        ), False
    if name == "TooManyRedirects":  # aiohttp's, which may not be there
        return "the server redirects without end", False
    if isinstance(status, int) and status >= 400:
        return f"the server answers with HTTP {status}", status >= 500 or status in _PASSING
    if name in _BROKEN:  # their own words are of HTTP's insides
        return f"the transfer broke off ({name})", True
    return f"{name}{': ' * bool(text)}{text[:300]}", True
