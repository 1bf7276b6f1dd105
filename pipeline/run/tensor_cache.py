"""A cache, in the user's cache folder, for tensors that take long to compute."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from pipeline.durable import write
from pipeline.folders import cache_folder

_log = logging.getLogger(__name__)


def read_tensor(kind: str, key: Mapping[str, object]) -> Tensor | None:
    """The tensor written under this key; None if there is none, or if the file is damaged."""
    try:
        with safe_open(_file(kind, key), framework="pt") as file:
            tensor: Tensor = file.get_tensor("tensor")
            return tensor if (file.metadata() or {}).get("sha256") == _digest(tensor) else None
    except (OSError, SafetensorError):
        return None


def write_tensor(kind: str, key: Mapping[str, object], tensor: Tensor) -> None:
    """Store a tensor under a key: what it was computed from. Only warns if the folder cannot be written."""
    file = _file(kind, key)
    tensor = tensor.detach().cpu().contiguous()
    metadata = {"sha256": _digest(tensor), "key": _canonical(key)}
    try:
        write(file, save({"tensor": tensor}, metadata))
    except OSError as error:
        _log.warning("%s could not be written for the next run: %s", file, error)


def _file(kind: str, key: Mapping[str, object]) -> Path:
    return cache_folder() / kind / f"{hashlib.sha256(_canonical(key).encode()).hexdigest()[:32]}.safetensors"


def _canonical(key: Mapping[str, object]) -> str:
    return json.dumps(key, sort_keys=True)


def _digest(tensor: Tensor) -> str:
    """safetensors checks the shape of a file, not its bits."""
    return hashlib.sha256(tensor.numpy().data).hexdigest()
