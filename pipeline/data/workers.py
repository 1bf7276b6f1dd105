"""The worker processes of a stream: how they start, and that they never outlive or hold up the training."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import multiprocessing.process
import os
import signal
import sys
import threading
import types
import weakref
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from pipeline import console

_PREFETCH = 4  # batches ahead, per worker
_TIMEOUT = 600  # seconds without a batch: an error rather than a run that waits for ever


class Loader(Iterator[Any]):
    """Items of `pipeline`, in order, made by `workers` processes (0: in this one). They start at once.

    Closed by `close()`, when collected, or at the end of the process.
    """

    def __init__(self, pipeline: IterableDataset[Any], workers: int) -> None:
        method = start_method() if workers else None
        loader: DataLoader[Any] = DataLoader(
            pipeline,
            batch_size=None,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            prefetch_factor=_PREFETCH if workers else None,
            timeout=_TIMEOUT if workers else 0,
            worker_init_fn=_die_with_the_rank,
            multiprocessing_context=method,
            generator=torch.Generator(),  # or it would draw from, and so change, the global random state
        )
        before = set(multiprocessing.active_children())
        if method == "forkserver":
            _start_fork_server()
        with _signals_blocked(), _no_main_module(method):
            self._items = iter(loader)
        processes = set(multiprocessing.active_children()) - before
        self._finalizer = weakref.finalize(self, _shut_down, self._items, processes)
        # finalize() does run at exit, but perhaps after multiprocessing has begun to wait for its children.
        atexit.register(self._finalizer)

    def __next__(self) -> Any:
        if not self._finalizer.alive:
            raise StopIteration  # closed: waiting for workers that are gone would take until the timeout
        return next(self._items)

    def close(self) -> None:
        self._finalizer()
        atexit.unregister(self._finalizer)


def start_method() -> str:
    """How workers start: by fork as long as the process has not touched CUDA, else from a fork server.

    Forking a process that uses CUDA, NCCL or InfiniBand can hang the child (PyTorch's notes on DDP say so);
    a fork server, which imports torch once per rank, costs some seconds and 0.3 GB instead of milliseconds.
    On CPU nothing of the sort is at stake, and short runs and tests start at once.
    """
    return "forkserver" if torch.cuda.is_initialized() else "fork"  # type: ignore[no-untyped-call]


def _start_fork_server() -> None:
    """With what the workers need imported, once, and deaf to signals like them.

    It brings multiprocessing's resource tracker along, whose start lets SIGINT and SIGTERM through again:
    so that comes first.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(["pipeline.data.stream"])
    resource_tracker.ensure_running()
    with _signals_blocked():
        forkserver.ensure_running()


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """What is started inside never sees Ctrl-C or a scheduler's notice: those go to the whole process group,
    and are the training process's to answer, with its workers alive until it is done.
    """
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _no_main_module(method: str | None) -> Iterator[None]:
    """Keep a fork server's workers from importing the training script, which they do not need, anew."""
    main = sys.modules["__main__"]
    if method == "forkserver":
        sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _die_with_the_rank(_: int) -> None:
    """In a worker: end as soon as the training process does, however it ended.

    DataLoader's own watchdog looks for another parent, which a fork server's child never gets, and which,
    kept alive by that child, never ends: without this, both would outlive a killed rank for good.
    """
    console.take()  # a fork server's child has streams of its own
    rank = multiprocessing.parent_process()
    assert rank is not None

    def watch() -> None:
        rank.join()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="watch-rank", daemon=True).start()


def _shut_down(items: Any, processes: set[multiprocessing.process.BaseProcess]) -> None:
    if processes:
        items._shutdown_workers()  # what the iterator's own __del__ does; idempotent
    for process in processes:
        if process.is_alive():  # stuck in a read; SIGTERM is blocked, see above
            process.kill()
