"""Files that appear whole or not at all, and last, also on file systems that lack something; and patience
with those that are away for a moment."""

from __future__ import annotations

import errno
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a disk answers that has no room

# What a file system answers that has no fsync, of files or (some FUSE and SMB mounts) of folders.
_LACKING = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_LACKING_FOR_FOLDERS = _LACKING | {errno.EACCES, errno.EPERM, errno.EBADF, errno.EISDIR}

_T = TypeVar("_T")
_PAUSES_S = (0.0, 1.0, 2.0, 4.0, 8.0, 15.0)  # between tries: a file server may be away for half a minute
_LASTING = frozenset((
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EACCES, errno.EPERM,
    errno.EMFILE,
))  # fmt: skip


@contextmanager
def whole(path: Path, make_folder: bool = True) -> Iterator[Path]:
    """Where to write what becomes `path` when the block ends; nothing is left behind if it fails.

    Readers see the old file or all of the new one. Several processes may write it at once; the last one
    wins. Raises OSError. make_folder: False where a folder that is gone was removed by another process.
    """
    if make_folder:
        path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield partial
        partial.replace(path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write(path: Path, content: str | bytes, make_folder: bool = True, synced: bool = False) -> None:
    """Write a file whole or not at all, text in UTF-8. Raises OSError.

    synced: also if the machine fails just after. Some file systems rename a file before its content is on
    disk, and leave an empty one.
    """
    with whole(path, make_folder) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        if synced:
            sync(partial)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file with the mode of any new file here; the library's own is for its owner alone.

    Raises OSError or SafetensorError.
    """
    from safetensors.torch import save_file

    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    save_file(dict(tensors), path, metadata)
    with suppress(PermissionError):  # on file systems without modes
        path.chmod(mode)


def sync(path: Path) -> None:
    """Wait until a file or folder is on disk, where the file system can say so. Raises OSError."""
    lacking = _LACKING_FOR_FOLDERS if path.is_dir() else _LACKING
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in lacking:
            raise


def patiently(act: Callable[[], _T]) -> _T:
    """`act`, tried for half a minute while it raises an OSError that may pass. Raises the last one."""
    for pause in _PAUSES_S:
        try:
            return act()
        except OSError as error:
            if error.errno in _LASTING:
                raise
        time.sleep(pause)
    return act()
