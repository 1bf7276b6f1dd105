"""A home for libraries where the user's own cannot be used, as in containers that run under any number."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path


def provide_home() -> None:
    """Point this process, and those it starts, to folders that can be written.

    Without an account, or without a home folder, there is no place for configs and caches: HOME is set. In a
    home that cannot be written, only what libraries write is put elsewhere.
    """
    if not hasattr(os, "getuid"):
        return
    if not _has_account():
        os.environ.setdefault("USER", str(os.getuid()))  # asked for by torch's compiler
    home = Path(os.path.expanduser("~"))  # noqa: PTH111, which raises where there is none
    if not home.is_absolute() or not home.is_dir() or home == Path("/"):
        os.environ["HOME"] = str(_folder_of_ours())
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    if not _can_be_written(cache):
        os.environ["XDG_CACHE_HOME"] = str(_folder_of_ours())
    config = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
    if not _can_be_written(config):
        os.environ.setdefault("MPLCONFIGDIR", str(_folder_of_ours()))


def _has_account() -> bool:
    import pwd

    with suppress(KeyError):
        return bool(pwd.getpwuid(os.getuid()))
    return False


def _can_be_written(folder: Path) -> bool:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return os.access(existing, os.W_OK)


def _folder_of_ours() -> Path:
    """Among temporary files, the same every time, unless it belongs to someone else."""
    folder = Path(tempfile.gettempdir()) / f"shardgan-{os.getuid()}"
    with suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.stat().st_uid == os.getuid() and os.access(folder, os.W_OK):
            return folder
    return Path(tempfile.mkdtemp(prefix="shardgan-"))
