"""Folders of this machine that a process can write to: a home for libraries, our cache, one for sockets."""

from __future__ import annotations

import os
import secrets
import socket
import tempfile
from contextlib import suppress
from pathlib import Path

from pipeline.errors import UserError, expanded

_FOR_SOCKETS = ("/tmp", "/var/tmp", "/dev/shm")  # if the folder for temporary files cannot hold them
_NAME = "pymp-12345678/listener-12345678"  # of multiprocessing's sockets, in that folder


def provide_home() -> None:
    """Point this process, and those it starts, to folders that can be written.

    Without an account or a home folder, as in containers that run under any number, HOME is set. If the home
    cannot be written, only the folders that libraries write to are set.
    """
    if os.environ.get("MPLBACKEND", "").startswith("module:"):  # a notebook's own, as its shell commands
        del os.environ["MPLBACKEND"]  # inherit it, is not installed here
    if not hasattr(os, "getuid"):
        return
    if not _has_account():
        os.environ.setdefault("USER", str(os.getuid()))  # torch's compiler asks for it
    home = Path(os.path.expanduser("~"))  # noqa: PTH111, which raises where there is none
    os.environ.setdefault("HOME", str(home))  # W&B's service does not ask for the account's
    if not home.is_absolute() or not home.is_dir() or home == Path("/"):
        os.environ["HOME"] = str(_folder_of_ours())
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    if not _can_be_written(cache):
        os.environ["XDG_CACHE_HOME"] = str(_folder_of_ours())
    config = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
    if not _can_be_written(config):
        os.environ.setdefault("MPLCONFIGDIR", str(_folder_of_ours()))


def cache_folder() -> Path:
    """Where what can be fetched or built again is kept: SHARDGAN_CACHE, else the user's cache folder."""
    import platformdirs

    return expanded(os.environ.get("SHARDGAN_CACHE") or platformdirs.user_cache_dir("shardgan")).absolute()


def socket_folder() -> str:
    """The folder for temporary files, or another one if its name is too long for sockets in it.

    Raises UserError if there is none.
    """
    folders = list(_FOR_SOCKETS)
    with suppress(FileNotFoundError):
        folders.insert(0, tempfile.gettempdir())
    for folder in folders:
        if _takes_sockets(folder):
            return folder
    raise UserError(
        f"No sockets can be made in {', '.join(dict.fromkeys(folders))}. Set TMPDIR to a folder on a disk of "
        f"this machine whose name has at most {106 - len(_NAME)} letters."
    )


def _has_account() -> bool:
    import pwd

    with suppress(KeyError):
        return bool(pwd.getpwuid(os.getuid()))
    return False


def _can_be_written(folder: Path) -> bool:
    existing = next(path for path in (folder, *folder.parents) if os.path.exists(path))  # noqa: PTH110, raises
    return os.access(existing, os.W_OK)


def _folder_of_ours() -> Path:
    """Among temporary files, the same every time unless it belongs to someone else."""
    folder = Path(tempfile.gettempdir()) / f"shardgan-{os.getuid()}"
    with suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.stat().st_uid == os.getuid() and os.access(folder, os.W_OK):
            return folder
    return Path(tempfile.mkdtemp(prefix="shardgan-"))


def _takes_sockets(folder: str) -> bool:
    """Tried with a name of the right length."""
    path = Path(folder) / secrets.token_hex(16)[: len(_NAME)]
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.bind(os.fspath(path))
        except OSError:
            return False
        path.unlink(missing_ok=True)
    return True
