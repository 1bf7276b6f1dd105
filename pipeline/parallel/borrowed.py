"""A process that is someone else's, a notebook or a script, which continues after training in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def borrowed() -> Iterator[None]:
    """Afterwards environment, global random state and cuDNN's settings are as before."""
    environment, deterministic = dict(os.environ), torch.backends.cudnn.deterministic
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        torch.backends.cudnn.deterministic = deterministic
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
