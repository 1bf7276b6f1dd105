"""Standard output and standard error that can neither stop a process nor block it.

A console may be full, closed, broken, read by nobody, or lack characters. Python raises or blocks for each of
these. Here a thread writes: it drops what the console does not accept.
"""

from __future__ import annotations

import io
import logging
import os
import queue
import re
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing import util
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_MOMENT_S = 0.2  # a line waits so long for a console that is not known to be stuck: order, and crashes
_LAST_LINES_S = 5.0  # … and the last lines of a process for a slow console
_MOST_WAITING = 10_000  # writes; a console further behind misses lines


def take() -> None:
    """Let this process write through threads. Call once, before libraries keep references to the streams.

    Streams that someone else has replaced (a notebook, a test) stay as they are.
    """
    for fd in range(3):  # a closed one would be the next file that is opened
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(fd, True)
    writers: dict[tuple[int, int], _Writer] = {}
    for name, fd in (("stdout", 1), ("stderr", 2)):
        before = getattr(sys, name)
        if before is not getattr(sys, f"__{name}__"):
            continue
        if before is not None:
            with suppress(OSError, ValueError):
                before.flush()
        place = os.fstat(fd)
        writer = writers.setdefault((place.st_dev, place.st_ino), _Writer())  # of one file: lines keep order
        encoding = getattr(before, "encoding", None) or "utf-8"
        after = io.TextIOWrapper(_Outlet(name, fd, writer), encoding, "replace", line_buffering=True)
        setattr(sys, name, after)
        for handler in _log_handlers():
            if handler.stream is before:
                handler.setStream(after)


def show_error(error: object) -> None:
    """`error: …` on standard error, red where that is a terminal with colours (https://no-color.org).

    It may quote names of files and what a server said, which must not steer the terminal.
    """
    wanted = os.environ.get("TERM", "dumb") != "dumb" and not os.environ.get("NO_COLOR")
    sign = "\x1b[31merror:\x1b[0m" if wanted and sys.stderr.isatty() else "error:"
    text = re.sub(r"[^\n\x20-\x7e\xa0-\U0010ffff]", lambda c: f"\\x{ord(c[0]):02x}", str(error))
    print(sign, text, file=sys.stderr, flush=True)


def settle() -> None:
    """Wait until everything written so far is out, but not for a console that takes too long."""
    deadline = time.monotonic() + _LAST_LINES_S
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with suppress(OSError, ValueError):
                stream.flush()
        outlet = getattr(stream, "buffer", None)
        if isinstance(outlet, _Outlet):
            outlet.writer.wait(max(deadline - time.monotonic(), 0))


def lost() -> str:
    """Why standard output did not take everything written so far, as on a full disk.

    "" if it did, or if whoever reads it has had enough.
    """
    settle()
    outlet = getattr(sys.stdout, "buffer", None)
    error = outlet.error if isinstance(outlet, _Outlet) else None
    return "" if error is None or isinstance(error, BrokenPipeError) else error.strerror or str(error)


def end_process(status: int) -> NoReturn:
    """End this process at once, after what it wrote is shown.

    In an ordinary exit, threads of torch.distributed and DeepSpeed that outlive the objects they wait on
    sometimes abort the process, and the launcher reports a finished training as failed.
    """
    settle()
    os._exit(status)


class _Outlet(io.RawIOBase):
    """A file descriptor for which any write succeeds at once."""

    def __init__(self, name: str, fd: int, writer: _Writer) -> None:
        self.name, self._fd, self.writer = f"<{name}>", fd, writer
        self.error: OSError | None = None  # the last of a write

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd

    def isatty(self) -> bool:
        return os.isatty(self._fd)

    def write(self, data: ReadableBuffer, /) -> int:
        content = bytes(data)
        self.writer.put(self, content)
        return len(content)

    def write_now(self, data: bytes) -> None:
        """In the writer's thread, if there is one."""
        try:
            while data:
                try:
                    data = data[os.write(self._fd, data) :]
                except BlockingIOError:  # whoever shares the console has made it non-blocking
                    select.select([], [self._fd], [])
        except OSError as error:
            self.error = error


class _Writer:
    """Writes in a thread of its own, in order."""

    _waiting: queue.SimpleQueue[tuple[_Outlet, bytes, threading.Event]]
    _last: threading.Event  # set once the newest of them is written
    _started: bool

    def __init__(self) -> None:
        self._begin()
        os.register_at_fork(after_in_child=self._begin)  # threads are not forked, and locks as they were

    def put(self, outlet: _Outlet, data: bytes) -> None:
        """Returns once the data are written, or after a moment; at once while earlier data are stuck."""
        if not self._started:
            try:
                threading.Thread(
                    target=self._work, args=(self._waiting,), name="console", daemon=True
                ).start()
            except (RuntimeError, MemoryError):  # there may be no more threads
                outlet.write_now(data)
                return
            self._started = True
            util.Finalize(None, settle, exitpriority=0)
        if self._waiting.qsize() >= _MOST_WAITING:
            return
        stuck, self._last = not self._last.is_set(), threading.Event()
        last = self._last
        self._waiting.put((outlet, data, last))
        if not stuck:
            last.wait(_MOMENT_S)

    def wait(self, seconds: float) -> None:
        self._last.wait(seconds)

    def _begin(self) -> None:
        self._waiting, self._last, self._started = queue.SimpleQueue(), threading.Event(), False
        self._last.set()

    @staticmethod
    def _work(waiting: queue.SimpleQueue[tuple[_Outlet, bytes, threading.Event]]) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # they are the main thread's
        while True:
            outlet, data, done = waiting.get()
            outlet.write_now(data)
            done.set()


def _log_handlers() -> Iterator[logging.StreamHandler[io.TextIOBase]]:
    """The handlers of all loggers that write to a stream."""
    for logger in (logging.getLogger(), *map(logging.getLogger, list(logging.root.manager.loggerDict))):
        for handler in logger.handlers:
            if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                yield handler
