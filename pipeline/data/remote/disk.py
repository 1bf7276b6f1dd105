"""What the disks of this machine refuse, so that the server is not blamed for it."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.config import UserError
from pipeline.durable import FULL

_REFUSALS = (*FULL, errno.EROFS)


class PassingError(UserError):
    """A disk of this machine is full, or the file was removed from it: perhaps only for now."""


@contextmanager
def disk_named(what: str, advice: str) -> Iterator[None]:
    """Raises UserError for what a disk of this machine refuses while `what` is fetched; other errors pass."""
    try:
        yield
    except OSError as error:
        # Only errors of files here name a file: those that tell of the server's have one argument, its URL.
        here = isinstance(error, (FileNotFoundError, PermissionError)) and error.filename is not None
        if not here and error.errno not in _REFUSALS:
            raise
        kind = PassingError if error.errno in (errno.ENOSPC, errno.ENOENT) else UserError
        file = f" ({error.filename})" if here else ""
        raise kind(f"{what} cannot be fetched: {error.strerror} on this machine{file}; {advice}.") from None


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for the time of the block. Raises UserError if none can be made."""
    try:
        made = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    except OSError as error:
        raise _no_scratch(error) from None
    with made as folder:
        yield Path(folder)


def linked(link: Path, target: Path) -> Path:
    """Another name of `target`, made again if it was removed. `link` is in a scratch folder."""
    try:
        link.unlink(missing_ok=True)
        link.symlink_to(target.absolute())
    except OSError as error:
        raise _no_scratch(error) from None
    return link


def _no_scratch(error: OSError) -> UserError:
    folder = tempfile.tempdir or os.environ.get("TMPDIR", "/tmp")  # None if no folder at all can be written
    return UserError(
        f"TMPDIR ({folder}) cannot be written: {error.strerror or error}. Set TMPDIR to a folder on a disk "
        "with room."
    )
