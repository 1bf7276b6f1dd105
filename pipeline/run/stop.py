"""How a process is asked to stop: by a signal, or by the end of its launcher.

Signal handlers do nothing here. The interpreter writes each signal's number into a socket, even while the
main thread is inside a library, and one thread reads them in turn: handling one signal cannot interrupt
handling another, however close together they come.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from pipeline import STOP_SIGNALS

LAUNCHER = "SHARDGAN_LAUNCHER"  # in a child's environment: the PID of its parent, whose end stops the child
INTERRUPTED = 130  # exit status after Ctrl-C, as shells have it
TERMINATED = 143  # exit status of a rank that another signal ended before it joined the others

_LAUNCHERS = (
    *("accelerate", "accelerate-launch", "accelerate.commands.launch"),
    *("torchrun", "torch.distributed.run", "torch.distributed.launch"),
)
_INTERVAL_S = 0.5
_APART_S = 1.0  # a second Ctrl-C within it is the same one


def hold() -> None:
    """Keep stop signals pending for this thread and the processes that it starts, until they listen."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def ignore() -> None:
    """Ignore stop signals, once all is done: else one would end this process in Python's own exit."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class StopSignals:
    """Listens for SIGTERM, SIGINT, SIGHUP and further signals, and watches the launcher, in one thread.

    SIGHUP stays ignored where it was (nohup). Outside the main thread, where Python allows no handlers, only
    the launcher is watched.
    """

    def __init__(
        self,
        *further: str,
        on_stop: Callable[[int], None] = lambda _: None,
        on_kill: Callable[[], None] = lambda: None,
        on_tick: Callable[[], None] = lambda: None,
        borrowed: bool = False,
    ) -> None:
        """further: names of signals, as "USR1". The callbacks run in the listening thread.
        borrowed: the process belongs to a caller and outlives the training, so run.grace does not end it.

        on_stop: called once, with the first signal. on_kill: called before a second Ctrl-C ends this process.
        on_tick: called about twice a second, and after each signal.
        """
        self.received: str | None = None  # why this process must stop, as "on SIGTERM"
        self.number: int | None = None  # of the signal that it must stop by
        self._on_stop, self._on_kill, self._on_tick = on_stop, on_kill, on_tick
        self._grace_s: float | None = None
        self._borrowed = borrowed
        self._joining = self._alone = self._concluded = False
        self._asked_s = 0.0  # since it was asked to stop
        self._ctrl_c: float | None = None
        self._launcher = _launcher()
        self._handlers: dict[int, object] = {}
        self._closed = threading.Event()
        self._inbox, self._outbox = socket.socketpair()
        self._inbox.settimeout(_INTERVAL_S)
        self._outbox.setblocking(False)
        self._installed = threading.current_thread() is threading.main_thread()
        if self._installed:
            self._wakeup_fd = signal.set_wakeup_fd(self._outbox.fileno(), warn_on_full_buffer=False)
            if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
                self._handle(signal.SIGHUP)
            self._handle(signal.SIGTERM, signal.SIGINT, *(signal.Signals[f"SIG{name}"] for name in further))
            _of_this_process.add(self)
        self._thread = threading.Thread(target=self._listen, name="stop-signals", daemon=True)
        self._thread.start()
        if self._installed:  # others, which would end this process, stay pending until `configure` knows them
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self._handlers)

    def configure(self, chosen: str, grace_s: float) -> None:
        """chosen: one more signal, as "USR1". grace_s: the process ends this many seconds after it."""
        if self._installed:
            self._handle(signal.Signals[f"SIG{chosen}"])
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        self._grace_s = None if self._borrowed else grace_s

    @contextmanager
    def joining(self, alone: bool = False) -> Iterator[None]:
        """While this rank waits for others, who may never come (alone: there are none): a signal ends it in a
        second or two, with status INTERRUPTED or TERMINATED. The launcher then ends the others."""
        self._joining, self._alone = not alone, alone
        try:
            yield
        finally:
            self._joining, self._asked_s = False, 0.0

    def concluded(self) -> None:
        """The run is saved and its end recorded: to be ended by run.grace is no error any more."""
        self._concluded = True

    def done(self) -> None:
        """The run has ended: run.grace no longer applies."""
        self._grace_s = None

    @property
    def interrupted(self) -> bool:
        """By Ctrl-C."""
        return self.number == signal.SIGINT

    @property
    def status(self) -> int:
        """Exit status of a process that was stopped before it began."""
        return INTERRUPTED if self.interrupted else TERMINATED

    def raise_again(self) -> None:
        """Once closed: raise the signal that was heard, if any, for whoever handled it before."""
        if self.number is not None:
            signal.raise_signal(self.number)

    def close(self) -> None:
        """Stop listening, with the handlers as they were before."""
        if self._installed:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)  # type: ignore[arg-type]
            signal.set_wakeup_fd(self._wakeup_fd)
            _of_this_process.discard(self)
        self._closed.set()
        self._outbox.send(b"\0")  # wakes the thread
        self._thread.join()
        self._inbox.close()
        self._outbox.close()

    def _handle(self, *numbers: int) -> None:
        for number in numbers:
            if number not in self._handlers:
                self._handlers[number] = signal.signal(number, _do_nothing)

    # In the thread

    def _listen(self) -> None:
        # The main thread may hold them for its children.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, list(self._handlers))
        last = time.monotonic()
        while not self._closed.is_set():
            try:
                numbers = self._inbox.recv(64)
            except TimeoutError:
                numbers = b""
            now = time.monotonic()
            for number in numbers:
                if number in self._handlers:
                    self._hear(number, now)
            if self._launcher is not None and os.getppid() != self._launcher:
                self._stop(signal.SIGTERM, f"because its launcher (PID {self._launcher}) has ended")
            self._on_tick()
            if self.received is not None:
                self._asked_s += min(now - last, 2 * _INTERVAL_S)  # a suspended process does not age
                self._give_up()
            last = now

    def _hear(self, number: int, now: float) -> None:
        if number == signal.SIGINT:
            if self._ctrl_c is None:
                self._ctrl_c = now
            elif now - self._ctrl_c > _APART_S and any(map(os.isatty, (0, 1, 2))):
                self._on_kill()
                _end(INTERRUPTED)
        name = signal.Signals(number).name
        self._stop(number, f"on {name}{' (Ctrl-C)' * (number == signal.SIGINT)}")

    def _stop(self, number: int, reason: str) -> None:
        if self.received is None:
            self.number, self.received = number, reason
            self._on_stop(number)

    def _give_up(self) -> None:
        if self._joining and self._asked_s > 1.0:
            _end(self.status)
        elif not self._joining and self._grace_s is not None and self._asked_s >= self._grace_s:
            if self._concluded:  # W&B, say, has not taken all yet
                _end(INTERRUPTED if self.interrupted and self._alone else 0)
            what = f"asked to stop ({self.received}), and not done within run.grace = {self._grace_s:g} s"
            # The scheduler is about to kill this process: end with a message instead.
            _end(1, f"error: {what}. The same command continues from the newest checkpoint.\n")


_of_this_process: set[StopSignals] = set()


def _in_a_fork() -> None:
    """Keep a forked child from writing its signals into its parent's socket."""
    if _of_this_process:
        signal.set_wakeup_fd(-1)
        _of_this_process.clear()


os.register_at_fork(after_in_child=_in_a_fork)


def _do_nothing(_number: int, _frame: object) -> None:
    """The interpreter itself writes the number into the socket."""


def _launcher() -> int | None:
    """PID of the launcher whose end stops this process, if there is one.

    A shell, a notebook or a user's script is none: what they start outlives them.
    """
    ours = os.environ.pop(LAUNCHER, None)
    if ours is not None:
        return int(ours)  # if it is not the parent, it has ended
    parent = os.getppid()
    with suppress(psutil.Error):
        words = psutil.Process(parent).cmdline()[:4]
        if any(Path(word).name in _LAUNCHERS for word in words):
            return parent
    return None


def _end(status: int, message: str = "") -> None:
    """End this process at once, from a thread, whatever the main thread is doing."""
    if os.isatty(1):
        message = f"\x1b[?25h{message}"  # a progress bar hides the cursor
    with suppress(OSError, ValueError):
        if message and select.select([], [2], [], 1.0)[1]:  # nobody may be reading
            os.write(2, message.encode())
    os._exit(status)
