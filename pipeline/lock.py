"""One process at a time in a folder, on any file system; locks of dead processes need no clean-up.

The lock of FOLDER is a file in FOLDER/.lock whose name is a number and whose content describes its holder. To
take over from a holder that is gone, a process creates the file of the next number, which only one can, and
removes the earlier one; a holder that was only suspended finds its file gone, and writes no more.

On the same machine the holder's process shows whether it is gone; from another container there, the `flock`
on its file; from another machine its heartbeat, a number in the file that changes every BEAT_S seconds.
Heartbeats are compared with each other, never with the clock of another machine.
"""

from __future__ import annotations

import errno
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from pipeline.errors import StoppedError, UserError
from pipeline.holder import Holder, flock, read_holder

LOCK = ".lock"
BEAT_S = 15.0
_MISSED = 3.3  # heartbeats; after so many missed ones the holder is gone
_POLL_S = 0.1
_MAKING = 10  # attempts to make a folder that others remove
_PATIENCE_S = 1.0  # of waiting; then say for what


class HeldError(UserError):
    """Another process is at work in the folder."""

    def __init__(self, folder: Path, holder: Holder) -> None:
        super().__init__(f"{folder} is in use by {holder}.")
        self.holder = holder


class LockLostError(UserError):
    """Another process is, or may be, at work in a folder that this one held: it must write nothing more."""

    status = 1  # whatever the user gave


class Lock:
    """A folder that this process holds, until it leaves the `with` block or calls `release`."""

    def __init__(self, folder: Path, path: Path, file: int) -> None:
        """file: `path`, open, and made by this process."""
        self._folder, self._path, self._file = folder, path, file
        self._holder = f"{json.dumps(asdict(Holder(os.path.realpath(path), flock(file))))}\n".encode()
        self._beats, self._released = 0, threading.Event()
        os.write(file, self._holder + self._beat)
        threading.Thread(target=self._keep_beating, name="lock", daemon=True).start()

    def check(self) -> None:
        """Call before writing; reads a small file.

        Raises LockLostError if another process has taken over, as it may while this one is suspended.
        """
        try:
            kept = self._path.read_bytes().startswith(self._holder)
        except (FileNotFoundError, NotADirectoryError):
            kept = False
        except OSError:  # a failing disk: the caller's writes will fail too
            return
        if not kept:
            folder, holder = self._folder, _newest(self._path.parent)[2]
            what = f"{folder} was taken over by {holder}" if holder else f"The lock of {folder} was removed"
            raise LockLostError(f"{what}. This process, perhaps suspended until now, writes no more.")

    def release(self) -> None:
        """Give the folder back, unless it was lost."""
        if self._released.is_set():
            return
        self._released.set()
        os.close(self._file)  # first: NFS keeps what is removed while it is open
        with suppress(OSError, LockLostError):
            self.check()
            self._path.unlink()
            self._path.parent.rmdir()

    def __enter__(self) -> Lock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    @property
    def _beat(self) -> bytes:
        return b"%010d\n" % self._beats

    def _keep_beating(self) -> None:
        """Thread. It reopens the file each time, as network file systems publish a file when it is closed."""
        while not self._released.wait(BEAT_S):
            with suppress(OSError), self._path.open("r+b") as file:
                if file.read(len(self._holder)) == self._holder:
                    self._beats += 1
                    file.write(self._beat)


def take(
    folder: Path,
    say: Callable[[str], None],
    wait: bool = False,
    stopped: Callable[[], bool] = lambda: False,
) -> Lock:
    """Hold a folder; create it if it is not there.

    wait: for a process that is at work there (always for an earlier attempt of the same job).
    say: gets, once, what is waited for. stopped: whether to wait no longer.
    Raises HeldError if another process is at work there, StoppedError if `stopped` says so while it waits,
    UserError if the folder cannot be written.
    """
    folder = folder.absolute()
    place, pulse = folder / LOCK, _Pulse()
    try:
        while True:
            _make(place)
            numbers, path, content = _read(place)
            holder = pulse.look(path, content)
            state = holder.state(path) if holder else "unknown"
            if not numbers or state == "gone" or (state == "unknown" and pulse.has_stopped):
                if lock := _create(folder, numbers, content):
                    return lock
                time.sleep(random.uniform(0, _POLL_S))  # others try as well
                continue
            waiting = wait or (holder is not None and holder.precedes_us)
            if holder and (state == "at work" or pulse.beats) and not waiting:
                raise HeldError(folder, holder)
            if stopped():
                raise StoppedError(f"Stopped while waiting for {folder}, in use by {holder or 'another'}.")
            pulse.explain(folder, holder, waiting, say)
            time.sleep(_POLL_S)
    except OSError as error:
        raise UserError(f"{folder} cannot be written to: {error.strerror or error}.") from None


@contextmanager
def turn(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold a folder that is there for nothing else, and is removed again. say, errors: see `take`."""
    try:
        with take(folder, say, wait=True):
            yield
    finally:
        with suppress(OSError):  # it is not there, or the next one is in it
            folder.rmdir()


def refuse_held(folder: Path) -> None:
    """Writes nothing. Raises HeldError if another process is at work in a folder, as far as seen at once."""
    _, path, holder = _newest(folder / LOCK)
    if holder and not holder.precedes_us and holder.state(path) == "at work":
        raise HeldError(folder, holder)


class _Pulse:
    """Whether the newest lock file of a folder changes."""

    def __init__(self) -> None:
        self._began = self._last = time.monotonic()
        self._seen: tuple[Path, bytes] | None = None
        self._silent_s, self._explained = 0.0, False
        self.beats = False

    def look(self, path: Path, content: bytes) -> Holder | None:
        holder, now = read_holder(content), time.monotonic()
        if self._seen == (path, content):
            self._silent_s += min(now - self._last, 10 * _POLL_S)  # this process may have been suspended too
        else:
            before, self._seen, self._silent_s = self._seen, (path, content), 0.0
            self.beats = before is not None and before[0] == path and read_holder(before[1]) == holder
        self._last = now
        return holder

    @property
    def has_stopped(self) -> bool:
        return self._silent_s >= _MISSED * BEAT_S

    def explain(self, folder: Path, holder: Holder | None, waiting: bool, say: Callable[[str], None]) -> None:
        """Say what is waited for, if it takes more than a moment."""
        if self._explained or holder is None or time.monotonic() - self._began < _PATIENCE_S:
            return
        self._explained = True
        what = "its end" if waiting else f"a sign of life, {_MISSED * BEAT_S:.0f} s at most"
        say(f"{folder} is in use by {holder}; waiting for {what}.")


def _make(place: Path) -> None:
    """Raises FileNotFoundError where no folder can be."""
    if place.parent.is_symlink() and not place.parent.exists():
        raise FileNotFoundError(errno.ENOENT, "it is a link that leads nowhere")
    for left in reversed(range(_MAKING)):
        try:
            with suppress(FileExistsError):  # also if its holder removes it at this moment
                if place.is_file():  # of an earlier version
                    place.unlink()
                place.mkdir(parents=True, exist_ok=True)
            return
        except FileNotFoundError:  # its holder may have removed the folder as well: see `turn`
            if not left:
                raise


def _create(folder: Path, seen: list[int], content: bytes) -> Lock | None:
    """Take over from the holders of the lock files `seen`, of which the newest had this content; None if
    others were faster."""
    number = max(seen, default=0) + 1
    path = folder / LOCK / str(number)
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except (FileExistsError, FileNotFoundError):
        return None
    try:
        # Numbers restart when a folder was free: one that was not seen is of a process that came meanwhile.
        if not set(_numbers(folder / LOCK)) <= {*seen, number}:
            raise FileExistsError
        if seen and (folder / LOCK / str(max(seen))).read_bytes() != content:  # nor is it the one seen
            raise FileExistsError
        lock = Lock(folder, path, file)
        for earlier in seen:
            (folder / LOCK / str(earlier)).unlink(missing_ok=True)
    except OSError as error:
        os.close(file)
        path.unlink(missing_ok=True)
        if isinstance(error, (FileExistsError, FileNotFoundError)):
            return None
        raise
    return lock


def _numbers(place: Path) -> list[int]:
    return sorted(int(path.name) for path in place.iterdir() if path.name.isdecimal())


def _read(place: Path) -> tuple[list[int], Path, bytes]:
    """All numbers of lock files, and the newest one with its content."""
    try:
        numbers = _numbers(place)
        path = place / str(max(numbers, default=0))
        return numbers, path, path.read_bytes() if numbers else b""
    except (FileNotFoundError, NotADirectoryError):  # released at this moment
        return [], place / "0", b""


def _newest(place: Path) -> tuple[list[int], Path, Holder | None]:
    numbers, path, content = _read(place)
    return numbers, path, read_holder(content)
