"""A strict walk over the members of a tar file.

Python's `tarfile`, and with it the usual loaders, takes a file cut at a member boundary or inside a header
for the end of the archive, and silently loses the rest. Here every byte is checked: header checksums, sizes,
the end-of-archive mark, and nothing but zeros after it. The file is read once, in order, and hashed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from itertools import count
from typing import BinaryIO, NamedTuple

from pipeline.config import UserError

BLOCK = 512
LARGEST_MEMBER = 64 << 20  # bytes held in memory at once; larger members are skipped, images refused
_LARGEST_EXTENSION = 1 << 20  # bytes of a member that describes the next one (long names)
_MOST_ZEROS = 1 << 20  # at the end: the largest records that tars are written in
MOST_HEADERS = 1_000_000  # of one file: what is stored of its members stays below a gigabyte
_NO_SIZE = "damaged: the member's size is not a number."
_REGULAR = (b"0", b"\0", b"7")
_FOLDER, _PAX_GLOBAL, _GNU_NAME, _GNU_LINK, _GNU_SPARSE = b"5", b"g", b"L", b"K", b"S"
_PAX = (b"x", b"X")
_WITHOUT_DATA = {b"1": "a link", b"2": "a link", b"3": "a device", b"4": "a device", b"6": "a pipe"}
_SPARSE = "a sparse file"
_COMPRESSED = {  # first bytes → how, and what unpacks it
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
}


class Member(NamedTuple):
    """A file in a tar. `name` is what the archive says: never use it as a path.

    irregular: what it is if it is no plain file (a link is never followed); data is then None.
    """

    name: str
    header: int  # byte offset of its header
    offset: int  # byte offset of its data
    size: int
    data: bytes | None  # None if larger than LARGEST_MEMBER
    irregular: str = ""


class TarReader:
    """Walks one tar file from front to back. `shard` is its name in messages.

    After the walk `size` and `sha256` are those of the whole file. Raises UserError, naming the shard and
    the byte offset, unless it is exactly one complete, plain tar.
    """

    def __init__(self, file: BinaryIO, shard: str) -> None:
        self._file = file
        self._shard = shard
        self._hash = hashlib.sha256()
        self.size = 0

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def error(self, offset: int, problem: str) -> UserError:
        return UserError(f"shard {self._shard}, byte {offset}: {problem}")

    def __iter__(self) -> Iterator[Member]:
        name: str | None = None  # set by a long-name entry for the member that follows
        size: int | None = None
        sparse = False
        for number in count():
            start = self.size
            if number > MOST_HEADERS:
                raise self.error(start, f"more than {MOST_HEADERS:,} members. Cut it into smaller shards.")
            header = self._read(BLOCK, "a member header")
            if not any(header):
                self._finish()
                return
            self._check(header, start)
            kind = header[156:157]
            if kind in (*_PAX, _PAX_GLOBAL, _GNU_NAME, _GNU_LINK):
                values = self._extension(header, start)
                if kind != _PAX_GLOBAL:
                    name = values.get("GNU.sparse.name", values.get("path", name))
                    size = self._decimal(values["size"], start) if "size" in values else size
                    sparse = sparse or any(key.startswith("GNU.sparse.") for key in values)
                continue
            member_size = self._number(header[124:136], start) if size is None else size
            member_name = _name(header) if name is None else name
            if kind in _WITHOUT_DATA:
                yield Member(member_name, start, self.size, 0, None, _WITHOUT_DATA[kind])
            elif kind in _REGULAR and not sparse:
                yield self._member(member_name, start, member_size)
            elif kind != _FOLDER:
                yield self._irregular(header, member_name, start, member_size)
            name = size = None
            sparse = False

    def _irregular(self, header: bytes, name: str, start: int, size: int) -> Member:
        """A file that is stored in a special way; its data is skipped."""
        kind = header[156:157]
        more = header[482] if kind == _GNU_SPARSE else 0
        while more:
            more = self._read(BLOCK, "the map of a sparse file")[504]
        what = _SPARSE if kind == _GNU_SPARSE or kind in _REGULAR else "a file of an unknown kind"
        return self._member(name, start, size)._replace(data=None, irregular=what)

    def _member(self, name: str, start: int, size: int) -> Member:
        offset = self.size
        what = f"the data of {name!r}"
        data: bytes | None = None
        if size <= LARGEST_MEMBER:
            data = self._read(size, what)
        else:
            for at in range(0, size, LARGEST_MEMBER):
                self._read(min(LARGEST_MEMBER, size - at), what)
        self._read(-size % BLOCK, f"the padding after {name!r}")
        return Member(name, start, offset, size, data)

    def _read(self, count: int, what: str) -> bytes:
        data = self._file.read(count)
        start = self.size
        self.size += len(data)
        self._hash.update(data)
        if len(data) < count:
            if self.size == 0:
                raise self.error(0, "an empty file, not a tar.")
            raise self.error(self.size, f"truncated: the file ends in {what}, which begins at byte {start}.")
        return data

    def _check(self, header: bytes, start: int) -> None:
        """The header's own checksum: the sum of its bytes, the checksum field read as blanks."""
        stated = _octal(header[148:156])
        if sum(header) - sum(header[148:156]) + 8 * ord(" ") == stated:
            return
        if start:
            raise self.error(start, "damaged: the checksum of this member header is wrong.")
        for first, (how, unpack) in _COMPRESSED.items():
            if header.startswith(first):
                raise self.error(
                    0, f"compressed with {how}; shards are plain .tar files. Unpack it with {unpack}."
                )
        raise self.error(0, "not a tar file.")

    def _number(self, field: bytes, start: int) -> int:
        """A size: octal digits, or big-endian binary marked by the first bit (GNU, for 8 GiB and more)."""
        if field[0] & 0x80:
            return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
        size = _octal(field) if field.strip(b" \0") else 0
        if size is None:
            raise self.error(start, _NO_SIZE)
        return size

    def _decimal(self, text: str, start: int) -> int:
        """A size in an extended header."""
        if not re.fullmatch("[0-9]{1,19}", text):
            raise self.error(start, _NO_SIZE)
        return int(text)

    def _extension(self, header: bytes, start: int) -> dict[str, str]:
        """What a pax or GNU entry says about the member after it: path and size, if given."""
        size = self._number(header[124:136], start)
        if size > _LARGEST_EXTENSION:
            raise self.error(start, f"a member name of {size} bytes.")
        data = self._member("a long name", start, size).data or b""
        if header[156:157] == _GNU_NAME:
            return {"path": _text(data.rstrip(b"\0"))}
        if header[156:157] == _GNU_LINK:
            return {}
        values, at = dict[str, str](), 0
        while at < len(data):
            length = data[at : max(at, data.find(b" ", at, at + 9))]
            record = data[at : at + int(length)] if length.isdigit() else b""
            if not record.endswith(b"\n") or b"=" not in record:
                raise self.error(start, "damaged: an extended header that cannot be read.")
            key, _, value = record[len(length) + 1 : -1].partition(b"=")
            values[_text(key)] = _text(value)
            at += len(record)
        return values

    def _finish(self) -> None:
        """After the first block of zeros: one more, then zeros to the end."""
        start = self.size
        if any(self._read(BLOCK, "the end-of-archive mark")):
            raise self.error(start, "damaged: one block of zeros, where the end-of-archive mark has two.")
        while chunk := self._file.read(1 << 20):
            if any(chunk):
                raise self.error(self.size, "there is something after the end of the archive.")
            self.size += len(chunk)
            self._hash.update(chunk)
            if self.size - start > _MOST_ZEROS:
                raise self.error(
                    start,
                    f"more than {_MOST_ZEROS:,} bytes of zeros from here on: the file was probably made at "
                    "its full size and never filled, as by a download that broke off. Fetch it again.",
                )
        if self.size % BLOCK:
            raise self.error(self.size, "truncated: the size is not a multiple of 512 bytes.")


def _name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return _text(prefix + b"/" + name if prefix else name)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "backslashreplace")


def _octal(field: bytes) -> int | None:
    """Octal digits, padded with blanks and zero bytes; None for anything else, signs included."""
    digits = field.strip(b" \0")
    return int(digits, 8) if re.fullmatch(rb"[0-7]+", digits) else None
