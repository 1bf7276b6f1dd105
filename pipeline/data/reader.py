"""Reads single samples out of shards, as the index lists them, and others in place of bad ones.

Streams open shards nowhere else.
"""

from __future__ import annotations

import os
import resource
import zlib
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from pipeline.config import UserError
from pipeline.data.index import Index
from pipeline.data.plan import Plan
from pipeline.data.samples import image_extension
from pipeline.data.sidecar import SampleTable
from pipeline.durable import patiently

Sample = dict[str, Any]  # as webdataset has it: __key__, __url__, and bytes by extension

_T = TypeVar("_T")
_OTHER_FILES = 256  # descriptors left to the rest of the process: sockets, tensors in transit
_TRIES = 16  # replacements that may be bad themselves


class BadSampleError(UserError):
    """A sample that cannot be used, in a shard that can."""


class Reader:
    """Reads samples by shard and row. One per process.

    A window of shards stays open, so that none is opened twice while the plan goes through a window.
    """

    def __init__(self, index: Index, window: int, patient: bool = True) -> None:
        """patient: read again for half a minute what a disk fails to read."""
        self._index, self._patient = index, patient
        self._limit = _may_open(window)
        self._open: OrderedDict[int, tuple[int, SampleTable]] = OrderedDict()

    def read(self, shard: int, row: int) -> Sample:
        """The sample as webdataset would give it: `__key__`, `__url__`, the image's bytes, `cls` if there.

        Raises BadSampleError if the bytes cannot be read or are not those that were indexed, UserError if the
        shard cannot be opened.
        """
        file, table = self._shard(shard)
        offset, size = int(table.offset[row]), int(table.size[row])
        url = self._index.shards[shard].url
        what = f"shard {url}, byte {offset}: sample {table.key(row)!r}"
        try:
            data = _pread(file, size, offset)
        except OSError:
            data = self._read_anew(shard, size, offset, what)
        if zlib.crc32(data) != table.crc[row]:
            raise BadSampleError(f"{what} is not what was indexed (wrong CRC). {self._index.mend(shard)}")
        sample: Sample = {"__key__": table.key(row), "__url__": url}
        sample[table.extensions[table.extension[row]]] = data
        if table.label[row] >= 0:
            sample["cls"] = b"%d" % table.label[row]
        return sample

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1][0])

    def _read_anew(self, shard: int, size: int, offset: int, what: str) -> bytes:
        """Again, from the file opened again: a network disk may have dropped it (ESTALE), or be away."""

        def once() -> bytes:
            with suppress(OSError):
                os.close(self._open.pop(shard)[0])
            return _pread(self._shard(shard)[0], size, offset)

        try:
            return patiently(once) if self._patient else once()
        except OSError as error:
            raise BadSampleError(f"{what} cannot be read: {error.strerror or error}.") from None

    def _shard(self, shard: int) -> tuple[int, SampleTable]:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        while len(self._open) >= self._limit:
            os.close(self._open.popitem(last=False)[1][0])
        file = self._index.open(shard)
        try:
            table = self._index.table(shard)
        except BaseException:
            os.close(file)
            raise
        self._open[shard] = (file, table)
        return file, table


class Replacements:
    """Puts another sample of the plan in the place of a bad one, the same one on every run.

    One per worker, shared by the stages that may find a sample bad. Unless `allowed`, a bad sample is an
    error.
    """

    def __init__(self, index: Index, plan: Plan, allowed: bool = True) -> None:
        self._index, self._plan, self._allowed = index, plan, allowed
        self._found: list[str] = []

    def replace(self, position: int, error: BadSampleError, use: Callable[[Sample], _T]) -> _T:
        """`use` of the first replacement for `position` that can be used. Raises `error` if none can."""
        if not self._allowed:
            raise error
        self._found.append(str(error))
        reader = Reader(self._index, self._plan.window, patient=False)  # the bad one has been waited for
        try:
            for attempt in range(_TRIES):
                shard, row = self._plan.replacement(position, attempt)
                try:
                    return use(reader.read(shard, row))
                except BadSampleError as another:
                    self._found.append(str(another))
        finally:
            reader.close()
        raise error

    def found(self) -> tuple[str, ...]:
        """What was wrong with the samples replaced since the last call, each naming shard and sample."""
        found, self._found = tuple(self._found), []
        return found


def image_of(sample: Sample) -> bytes:
    """The image of a webdataset sample, whatever its extension. Raises UserError if it has none."""
    extension = image_extension(sample)
    if extension is None:
        raise UserError(
            f"shard {sample.get('__url__')} sample {sample.get('__key__')} has no image left after the "
            "stages before decoding."
        )
    data: bytes = sample[extension]
    return data


def _may_open(wanted: int) -> int:
    """How many of `wanted` shards can be open at once. Raises the process's soft limit as far as needed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        return max(1, min(wanted, soft - _OTHER_FILES))
    return wanted


def _pread(file: int, size: int, offset: int) -> bytes:
    """All `size` bytes, or fewer at the end of the file (then the CRC is wrong)."""
    data = os.pread(file, size, offset)
    while len(data) < size and (more := os.pread(file, size - len(data), offset + len(data))):
        data += more
    return data
