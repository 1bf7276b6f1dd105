"""`data.cache=ram`: decoded images in memory that all processes of one machine share.

The memory is an anonymous file (memfd), which has no size limit but the machine's and leaves nothing behind.
Other processes open it through /proc. An image takes memory once it has been decoded.
"""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import cgroups
from pipeline.config import UserError
from pipeline.wording import in_bytes

_LABEL, _FLAG = 8, 1  # bytes per sample besides its pixels
_UINT8: np.dtype[Any] = np.dtype(np.uint8)
_SHARE = 0.75  # of the free memory: training needs some as well
_reserved: dict[str, int] = {}  # paths of memory that this process keeps → file descriptors


class Cache:
    """Decoded images and their labels by shard and row; `sizes` are the samples per shard.

    Any number of processes may get and put at once: two of them put the same for a sample, and none sees the
    flag of a sample before its pixels. The fence ensures that: no thread waits for it, but a processor may
    not reorder what is in two locked sections.

    The memory that `reserve` has given this process ends with its Cache here, and with those of others.
    """

    def __init__(
        self, path: str, sizes: Sequence[int], size: int, channels: int, dtype: np.dtype[Any] = _UINT8
    ) -> None:
        self.path, self._sizes, self._form = path, tuple(sizes), (size, channels, dtype)
        self._starts = list(accumulate(self._sizes, initial=0))
        self._fence = threading.Lock()
        n, pixels = self._starts[-1], size * size * channels
        try:
            with Path(path).open("r+b") as file:
                memory = mmap.mmap(file.fileno(), n * (_LABEL + pixels * dtype.itemsize + _FLAG))
        except OSError as error:
            raise UserError(
                f"data.cache=ram: shared memory cannot be opened ({error.strerror}). Set data.cache=none."
            ) from None
        weakref.finalize(self, release, path)
        self._labels = np.frombuffer(memory, np.int64, n)
        images = np.frombuffer(memory, dtype, n * pixels, offset=n * _LABEL)
        self._filled = np.frombuffer(memory, np.bool_, n, offset=n * _LABEL + images.nbytes)
        self._images = images.reshape(n, size, size, channels).transpose(0, 3, 1, 2)

    def __reduce__(self) -> tuple[type[Cache], tuple[Any, ...]]:
        return type(self), (self.path, self._sizes, *self._form)

    def get(self, shard: int, row: int) -> tuple[NDArray[Any], int] | None:
        """(image [C, H, W], label), a view that must not be written to; None if it has not been put yet."""
        slot = self._starts[shard] + row
        with self._fence:
            filled = self._filled[slot]
        with self._fence:
            return (self._images[slot], int(self._labels[slot])) if filled else None

    def put(self, shard: int, row: int, image: NDArray[Any], label: int) -> None:
        slot = self._starts[shard] + row
        with self._fence:
            self._images[slot], self._labels[slot] = image, label
        with self._fence:
            self._filled[slot] = True


def reserve(
    sizes: Sequence[int], size: int, channels: int, dtype: np.dtype[Any] = _UINT8
) -> tuple[str | None, str]:
    """Memory for all samples of a data set: the path for a Cache (None if they do not fit), and a line about
    it. It lasts until its Cache in this process is gone: a notebook trains again."""
    need = sum(sizes) * (size * size * channels * dtype.itemsize + _LABEL + _FLAG)
    what = f"data.cache=ram: {sum(sizes):,} decoded images, {in_bytes(need)}"
    if not hasattr(os, "memfd_create"):
        return None, f"{what}, are kept on Linux only; they are decoded again in each epoch"
    if need > _SHARE * (free := free_memory()):
        return None, (
            f"{what}, do not fit into {_SHARE:.0%} of the free memory ({in_bytes(free)}); they are decoded "
            "again in each epoch"
        )
    file = os.memfd_create("shardgan-cache", os.MFD_CLOEXEC)
    os.ftruncate(file, need)
    path = f"/proc/{os.getpid()}/fd/{file}"
    _reserved[path] = file
    return path, f"{what}, are kept in memory, once per machine"


def release(path: str) -> None:
    """Keep the memory at this path no longer, if this process has reserved it."""
    if (file := _reserved.pop(path, None)) is not None:
        os.close(file)


def free_memory() -> int:
    """Free bytes of the machine, or of a control group (a container, a Slurm job) if it has fewer."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    machine = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return min([machine, *_free_in_groups()])


def _free_in_groups() -> Iterator[int]:
    for folder, is_v1 in cgroups.folders("memory"):
        most, used, idle = "memory.max", "memory.current", "inactive_file"
        if is_v1:
            most, used, idle = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        with suppress(OSError, ValueError):
            limit = int((folder / most).read_text())  # "max" where there is none
            counts = dict(text.split() for text in (folder / "memory.stat").read_text().splitlines())
            # Cached files count as used, but are dropped when memory is needed.
            yield limit - int((folder / used).read_text()) + int(counts.get(idle, 0))
