"""What must be the same on every node of a training: a node's fingerprint, and how two of them differ."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import socket
import sys
from pathlib import Path
from typing import Any

from pipeline import config as configs
from pipeline.config import Config, UserError

_ROOT = Path(__file__).parents[1]
_PACKAGES = ("torch", "accelerate", "deepspeed", "webdataset", "numpy", "pillow", "wandb")
REMEDIES = {
    "code": f"Put the project ({_ROOT}) where all nodes see it, or copy it again.",
    "versions": "Install the same everywhere (bash launch/setup.sh), or set SHARDGAN_VENV to one environment "
    "that all nodes see.",
    "config": "Put the config where all nodes see it.",
    "data": "Put the data where all nodes see it (data.train), or copy it again and run doctor there.",
}

Fingerprint = dict[str, Any]  # "node", its name, and the keys of REMEDIES


def node_name() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def fingerprint(config: Config | None = None, data: str = "") -> Fingerprint:
    """Of this node; data: what it knows the data by. Without a config, of the installation alone.

    Raises UserError for a package that is not installed.
    """
    seen = {"node": node_name(), "code": code(), "versions": versions()}
    return seen if config is None else seen | {"config": digest(configs.dump(config)), "data": data}


def difference(what: str, here: Fingerprint, there: Fingerprint) -> str | None:
    """How `here` differs from `there` in one of the keys of REMEDIES; None if it does not, or lacks it."""
    if what not in here or what not in there or here[what] == there[what]:
        return None
    text = f"other {what} than {there['node']}"
    if what != "versions":
        return text
    mine, theirs = here[what], there[what]
    apart = [
        f"{name} {mine[name]} (not {theirs.get(name)})" for name in mine if mine[name] != theirs.get(name)
    ]
    return f"{text}: {', '.join(apart)}"


def versions() -> dict[str, str]:
    """Of Python and what training depends on. Raises UserError for what is not installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            raise UserError(
                f"{name} is not installed for {sys.executable}. Install the project there (bash "
                "launch/setup.sh), or set SHARDGAN_VENV."
            ) from None
    return found


def code() -> str:
    """A hash of the project's own files."""
    files = sorted(path for top in ("pipeline", "launch") for path in (_ROOT / top).rglob("*.py"))
    return digest([[str(path.relative_to(_ROOT)), path.read_text("utf-8")] for path in files])


def digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
