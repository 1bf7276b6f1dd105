"""Files that last, and that others may read, also on file systems that lack something."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

# What a file system answers that has no fsync, of files or (some FUSE and SMB mounts) of folders.
_LACKING = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_LACKING_FOR_FOLDERS = _LACKING | {errno.EACCES, errno.EPERM, errno.EBADF, errno.EISDIR}


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file with the mode of any new file here; the library's own is for its owner alone.

    Raises OSError or SafetensorError.
    """
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    save_file(dict(tensors), path, metadata)
    with suppress(PermissionError):  # on file systems without modes
        path.chmod(mode)


def sync(path: Path) -> None:
    """See to it that a file or folder is on disk, where the file system can say so. Raises OSError."""
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
