"""The worker processes of a stream: how they start, and how they never outlive or stall the training."""

from __future__ import annotations

import atexit
import contextlib
import functools
import multiprocessing
import multiprocessing.process
import multiprocessing.queues
import os
import shutil
import signal
import sys
import tempfile
import threading
import types
import weakref
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from pipeline import console
from pipeline.borrowed import is_borrowed
from pipeline.config import UserError
from pipeline.folders import socket_folder
from pipeline.interrupts import interrupts_held

_PREFETCH = 4  # batches ahead, per worker
_TIMEOUT_S = 600.0  # without a batch: an error
_LOOK_S = 5.0  # how often that is checked
_SHARED_MEMORY = Path("/dev/shm")
_FULL = f" Is {_SHARED_MEMORY} full? Make it larger (docker run --shm-size), or set data.workers=0."
_OF_THE_GROUP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class WorkerError(UserError):
    """A worker process has ended or is stuck."""

    status = 1


class Loader(Iterator[Any]):
    """Items of `pipeline`, in order, made by `workers` processes (0: in this one). They start at once.

    An item is (tensor of item_bytes, …), or an error; its tensor is in pinned memory if asked for. Closed by
    `close()`, when collected, or at exit. Raises UserError if workers cannot be started. Iterating raises
    WorkerError within seconds if one has ended or cannot hand over its item, and after 10 minutes without an
    item.
    """

    def __init__(
        self, pipeline: IterableDataset[Any], workers: int, item_bytes: int = 0, pinned: bool = False
    ) -> None:
        method = start_method() if workers else None
        folder = socket_folder() if workers else ""
        self._reasons, reasons = multiprocessing.Pipe(duplex=False)
        self._pin = pinned
        loader: DataLoader[Any] = DataLoader(
            pipeline,
            batch_size=None,
            collate_fn=_as_it_is if _fit_in_shared_memory(workers, item_bytes) else _as_array,
            num_workers=workers,
            pin_memory=self._pin,
            prefetch_factor=_PREFETCH if workers else None,
            worker_init_fn=functools.partial(_begin, reasons, folder, dict(os.environ)),
            multiprocessing_context=method,
            generator=torch.Generator(),  # or it would draw from, and so change, the global random state
        )
        before = set(multiprocessing.active_children())
        with interrupts_held(), _signals_blocked(), _no_main_module(method), _sigchld_as_before(), _refusal():
            if method is not None:
                multiprocessing.get_context(method).Lock()  # fails here without torch's traceback
            if method == "forkserver":
                _start_fork_server(folder)
            self._items = iter(loader)
        self._processes = set(multiprocessing.active_children()) - before
        self._patience = _Patience(self._processes)
        self._finalizer = weakref.finalize(self, _shut_down, self._items, self._processes, self._patience)
        # finalize() runs at exit, but perhaps after multiprocessing has begun to wait for its children.
        atexit.register(self._finalizer)

    def __next__(self) -> Any:
        if not self._finalizer.alive:
            raise StopIteration  # closed: there are no workers to wait for
        try:
            with self._patience:
                item = next(self._items)
        except (RuntimeError, OSError, EOFError) as error:
            if (reason := self._what_happened()) is None:
                raise
            self.close()
            raise WorkerError(reason) from error
        if isinstance(item, tuple | list) and isinstance(item[0], np.ndarray):
            tensor = torch.from_numpy(item[0])
            item = (tensor.pin_memory() if self._pin else tensor, *item[1:])
        return item

    def close(self) -> None:
        self._finalizer()
        atexit.unregister(self._finalizer)

    def _what_happened(self) -> str | None:
        """Why an item did not come, if that is because of a worker."""
        if self._patience.lost:
            return (
                f"The data workers have not made a batch within {_TIMEOUT_S:g} s, and were ended. Is storage "
                "slow, or a stage of data.stages stuck?"
            )
        by_sentinel = {process.sentinel: process for process in self._processes}
        if not (ready := wait(by_sentinel, timeout=1) if by_sentinel else []):
            return None
        if self._reasons.poll():
            reason = str(self._reasons.recv())
            return (
                f"A data worker could not hand over a batch: {reason}.{_FULL * ('shared memory' in reason)}"
            )
        ended = by_sentinel[ready[0]]  # type: ignore[index]
        ended.join()  # its sentinel is ready a moment before its status is there
        return _ending(ended)


class _Patience:
    """Kills the workers if an item does not come in time; the loader then finds that they have ended.

    Only seconds in which this process runs count, not those while it is suspended.
    """

    def __init__(self, processes: set[multiprocessing.process.BaseProcess]) -> None:
        self.lost = False
        self.over = threading.Event()
        self._processes, self._waiting, self._item = processes, False, 0
        if processes:
            threading.Thread(target=self._watch, name="watch-workers", daemon=True).start()

    def __enter__(self) -> None:
        self._item += 1
        self._waiting = True

    def __exit__(self, *_: object) -> None:
        self._waiting = False

    def _watch(self) -> None:
        item, waited = 0, 0.0
        while not self.over.wait(_LOOK_S):
            waited = waited + _LOOK_S if self._waiting and item == self._item else 0.0
            item = self._item
            if waited >= _TIMEOUT_S:
                self.lost = True
                for process in self._processes:
                    process.kill()
                return


def _ending(process: multiprocessing.process.BaseProcess) -> str:
    code = process.exitcode or 0
    if code >= 0:
        return f"A data worker (pid {process.pid}) ended by itself, with status {code}."
    name = signal.Signals(-code).name
    why = {"SIGKILL": ": out of memory? Fewer data.workers need less.", "SIGBUS": f".{_FULL}"}.get(name, ".")
    return f"A data worker (pid {process.pid}) was ended by {name}{why}"


def _as_it_is(item: Any) -> Any:
    return item


def _as_array(item: Any) -> Any:
    """In a worker: an array goes through a pipe, while a tensor would go through shared memory."""
    return (item[0].numpy(), *item[1:]) if isinstance(item, tuple) else item


def _fit_in_shared_memory(workers: int, item_bytes: int) -> bool:
    """Whether there is room for all tensors in transit, of this machine's other ranks too."""
    if not _SHARED_MEMORY.is_dir():
        return True  # not on Linux
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    needed = ranks * workers * (_PREFETCH + 2) * item_bytes
    return shutil.disk_usage(_SHARED_MEMORY).free >= needed


@contextlib.contextmanager
def _refusal() -> Iterator[None]:
    """Raises UserError if processes or semaphores cannot be created."""
    try:
        yield
    except (OSError, ImportError) as error:
        raise UserError(
            f"Data workers cannot be started here ({error}). They need processes, and semaphores in "
            f"{_SHARED_MEMORY}. Provide them, or set data.workers=0."
        ) from error


@contextlib.contextmanager
def _sigchld_as_before() -> Iterator[None]:
    """Without torch's handler, which raises anywhere when a worker dies: the next item due will show it."""
    before = signal.getsignal(signal.SIGCHLD)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, before)


def start_method() -> str:
    """How workers start: by fork, or from a fork server once the process has used CUDA or if it is borrowed.

    Forking a process that uses CUDA, NCCL or InfiniBand can hang the child (see PyTorch's notes on DDP); so
    can a lock that another thread holds just then, such as that of torch's random numbers, and of a borrowed
    process we do not know the threads. A fork server imports torch once per rank, which costs seconds and
    0.3 GB instead of milliseconds.
    """
    unsafe = is_borrowed() or torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return "forkserver" if unsafe else "fork"


def _start_fork_server(folder: str) -> None:
    """With the workers' imports, and signals blocked as in them. folder: for its socket.

    It starts multiprocessing's resource tracker, which unblocks SIGINT and SIGTERM: so that comes first.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(["pipeline.data.stream"])
    resource_tracker.ensure_running()
    before, tempfile.tempdir = tempfile.tempdir, folder
    try:
        with _signals_blocked():
            forkserver.ensure_running()
    finally:
        tempfile.tempdir = before


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Processes started inside ignore Ctrl-C and a scheduler's signals, which go to the whole process group:
    the training process handles them, and needs its workers until it is done."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _OF_THE_GROUP)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _no_main_module(method: str | None) -> Iterator[None]:
    """Keep a fork server's workers from importing the training script, which they do not need."""
    main = sys.modules["__main__"]
    if method == "forkserver":
        sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _begin(reasons: Connection, folder: str, environment: dict[str, str], _: int) -> None:
    """In a worker: take the environment of the training process, which may have changed since a fork server
    started; make sockets in `folder`; end with the training process, or when an item cannot be handed over,
    with the reason sent to `reasons`."""
    # A fork server that ran already, a notebook's own, has not blocked them.
    signal.pthread_sigmask(signal.SIG_BLOCK, _OF_THE_GROUP)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = folder

    def give_up(error: Exception, _item: object) -> NoReturn:
        """Called in a thread of multiprocessing's, which would print the error and continue."""
        reasons.send(f"{type(error).__name__}: {' '.join(str(error).split())}")
        os._exit(1)

    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(give_up)  # type: ignore[attr-defined]
    end_with_parent()


def end_with_parent() -> None:
    """In a child of multiprocessing: end as soon as the parent ends, however it ends.

    DataLoader's own watchdog waits for a change of parent, which a fork server's child never sees: without
    this, both would outlive a killed rank.
    """
    console.take()  # a fork server's child has streams of its own
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()


def _shut_down(items: Any, processes: set[multiprocessing.process.BaseProcess], patience: _Patience) -> None:
    patience.over.set()
    if processes:
        items._shutdown_workers()  # as the iterator's __del__ does; idempotent
    for process in processes:
        if process.is_alive():  # stuck in a read; SIGTERM is blocked, see above
            process.kill()
