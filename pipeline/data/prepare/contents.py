"""The bytes of one file, of a folder or of a zip: whole, of a bounded size, or the reason why not."""

from __future__ import annotations

import errno
import stat
import zipfile
from pathlib import Path

from pipeline.data.prepare.pictures import LeftOutError


def read_file(path: Path, most: int) -> bytes:
    """A whole regular file of at most so many bytes. Raises LeftOutError."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise LeftOutError("no regular files", "not a regular file")
        if found.st_size > most:
            raise LeftOutError("too large", f"larger than {most >> 20} MiB")
        return path.read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOENT, errno.ELOOP) and path.is_symlink():
            raise LeftOutError("links that lead nowhere", f"a link that leads nowhere ({reason})") from None
        denied = error.errno in (errno.EACCES, errno.EPERM)
        raise LeftOutError("no permission" if denied else "unreadable", reason) from None


def read_member(file: zipfile.ZipFile, member: zipfile.ZipInfo, most: int) -> bytes:
    """A whole file in a zip, of at most so many bytes. Raises LeftOutError."""
    try:
        with file.open(member) as opened:
            data = opened.read(most + 1)
    except Exception as error:  # in a damaged zip each way of packing raises errors of its own
        locked = isinstance(error, RuntimeError) and member.flag_bits & 1
        reason = "encrypted" if locked else str(error) or type(error).__name__
        raise LeftOutError("encrypted" if locked else "unreadable", reason) from None
    if len(data) > most:
        raise LeftOutError("too large", f"larger than {most >> 20} MiB")
    return data
