"""Where what can be fetched or built again is kept on this machine."""

from __future__ import annotations

import os
import re
from pathlib import Path

import platformdirs

from pipeline.config import Remote, UserError


def cache_folder() -> Path:
    """SHARDGAN_CACHE, else the user's cache folder."""
    return Path(os.environ.get("SHARDGAN_CACHE") or platformdirs.user_cache_dir("shardgan")).absolute()


def shards_folder(settings: Remote) -> Path:
    """Where shards of elsewhere are kept. Raises UserError if data.remote.folder names a variable that is
    not set, which would be a folder of that very name."""
    chosen = settings.folder
    if not chosen:
        return cache_folder() / "shards"
    for name in re.findall(r"\$(\w+|\{[^}]*\})", chosen, re.ASCII):
        if not os.environ.get(name.strip("{}")):
            raise UserError(
                f"data.remote.folder={chosen}: the variable {name.strip('{}')} is not set on this machine. "
                "Set it, or name a folder on one of its disks."
            )
    return Path(os.path.expandvars(chosen)).expanduser().absolute()
