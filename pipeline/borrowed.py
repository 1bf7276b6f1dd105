"""A process that is someone else's, a notebook or a script, whose other threads work on and which continues
after training in it."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from pipeline.heap import return_freed_memory

_is_borrowed = ContextVar("_is_borrowed", default=False)


def is_borrowed() -> bool:
    """Whether this process is, as far as the current thread knows."""
    return _is_borrowed.get()


@contextmanager
def environment_kept() -> Iterator[None]:
    """Afterwards environment variables are as before, whatever libraries inside have set."""
    environment = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)


@contextmanager
def borrowed() -> Iterator[None]:
    """Inside, `is_borrowed`. Afterwards environment, random state and cuDNN's settings are as before, and
    freed memory is given back."""
    token = _is_borrowed.set(True)
    cudnn = torch.backends.cudnn
    deterministic, benchmark = cudnn.deterministic, cudnn.benchmark
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    try:
        with environment_kept(), torch.random.fork_rng(devices):
            yield
    finally:
        _is_borrowed.reset(token)
        cudnn.deterministic, cudnn.benchmark = deterministic, benchmark
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            gc.collect()  # a session and its flags name each other
            torch.cuda.empty_cache()  # for other processes, as those that train next
        return_freed_memory()
