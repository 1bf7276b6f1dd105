"""Tensors that took long to compute, kept between runs in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from pipeline.folders import cache_folder

_log = logging.getLogger(__name__)


def read_tensor(kind: str, key: Mapping[str, object]) -> Tensor | None:
    """What was written under this key; None if nothing was, or if the file is damaged."""
    try:
        with safe_open(_file(kind, key), framework="pt") as file:
            tensor: Tensor = file.get_tensor("tensor")
            return tensor if (file.metadata() or {}).get("sha256") == _digest(tensor) else None
    except (OSError, SafetensorError):
        return None


def write_tensor(kind: str, key: Mapping[str, object], tensor: Tensor) -> None:
    """Keep a tensor under what it was made from. A folder that cannot be written costs time, not the run."""
    file = _file(kind, key)
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    tensor = tensor.detach().cpu().contiguous()
    metadata = {"sha256": _digest(tensor), "key": _canonical(key)}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(save({"tensor": tensor}, metadata))
        partial.replace(file)  # several processes may write the same: the last one wins, none sees a part
    except OSError as error:
        _log.warning("%s could not be kept for the next run: %s", file, error)
        with suppress(OSError):
            partial.unlink()


def _file(kind: str, key: Mapping[str, object]) -> Path:
    return cache_folder() / kind / f"{hashlib.sha256(_canonical(key).encode()).hexdigest()[:32]}.safetensors"


def _canonical(key: Mapping[str, object]) -> str:
    return json.dumps(key, sort_keys=True)


def _digest(tensor: Tensor) -> str:
    """safetensors checks the shape of a file, not its bits."""
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
