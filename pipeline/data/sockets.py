"""Where processes of this machine can meet at sockets, whose names must be short."""

from __future__ import annotations

import os
import secrets
import socket
import tempfile
from contextlib import suppress
from pathlib import Path

from pipeline.config import UserError

_ELSEWHERE = ("/tmp", "/var/tmp", "/dev/shm")  # if the folder for temporary files does not do
_NAME = "pymp-12345678/listener-12345678"  # multiprocessing's, in that folder


def socket_folder() -> str:
    """The folder for temporary files, or one with a shorter name if sockets cannot be made in that.

    Raises UserError if there is none.
    """
    folders = list(_ELSEWHERE)
    with suppress(FileNotFoundError):
        folders.insert(0, tempfile.gettempdir())
    for folder in folders:
        if _takes_sockets(folder):
            return folder
    raise UserError(
        f"No sockets can be made in {', '.join(dict.fromkeys(folders))}. Set TMPDIR to a folder on a disk of "
        f"this machine whose name has at most {106 - len(_NAME)} letters."
    )


def _takes_sockets(folder: str) -> bool:
    """Whether one could be made there, tried with a name of the right length."""
    name = f"shardgan-{secrets.token_hex(16)}"[: len(_NAME)].ljust(len(_NAME), "x")
    path = Path(folder) / name
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.bind(os.fspath(path))
        except OSError:
            return False
        path.unlink(missing_ok=True)
    return True
