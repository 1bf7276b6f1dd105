"""The `.wandb` file of an offline run: whether all of it is there.

W&B's service writes it without telling this process of errors: after a disk that was full for a moment it
writes no more, and says so in its own log alone.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

_HEADER = struct.pack("<4sHB", b":W&B", 0xBEE1, 0)
_BLOCK = 32 * 1024
_FRAGMENT = struct.Struct("<IHB")
_FULL, _FIRST, _LAST = 1, 2, 4


def is_whole(path: Path) -> bool:
    """Whether it was closed by the run's end. Raises OSError."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]  # made on import

    return any(Record.FromString(data).HasField("exit") for data in records(path.read_bytes()))


def records(data: bytes) -> Iterator[bytes]:
    """The whole, intact records of a .wandb file: a header, then the framing of LevelDB's logs.

    Blocks of 32 KiB hold fragments of records: checksum, length, kind (whole, first, middle or last), bytes.
    Ends at the first that is cut or damaged.
    """
    at, parts = len(_HEADER), b""
    while data.startswith(_HEADER) and at < len(data):
        left = _BLOCK - at % _BLOCK
        if left < _FRAGMENT.size:  # too little for a fragment: padding
            at += left
            continue
        if at + _FRAGMENT.size > len(data):
            return
        checksum, length, kind = _FRAGMENT.unpack_from(data, at)
        fragment = data[at + _FRAGMENT.size : at + _FRAGMENT.size + length]
        if zlib.crc32(bytes([kind]) + fragment) != checksum:
            return
        at += _FRAGMENT.size + length
        parts = fragment if kind in (_FULL, _FIRST) else parts + fragment
        if kind in (_FULL, _LAST):
            yield parts
