"""The machine that the GPU suite runs on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import UserError
from pipeline.parallel.gpus import gpus

ROOT = Path(__file__).parents[2]
SHARDS = ROOT / "tests" / "assets" / "fashion-mnist-500"
try:
    GPUS = gpus()  # as trainings count them: none if ACCELERATE_USE_CPU asks for a CPU
except UserError as unusable:  # every part would fail for this reason
    sys.exit(f"error: {unusable}")
WORLD = GPUS or 2
DEVICE = "cuda" if GPUS else "cpu"

Outcome = tuple[list[str], dict[str, Any]]  # what is wrong, in words, and figures


class Skipped(Exception):
    """Why this machine cannot do a part."""


def need(gpus: int) -> None:
    if gpus > GPUS:
        raise Skipped(f"needs {gpus} GPU{'s' * (gpus > 1)}; this machine has {GPUS}")


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def surroundings() -> Outcome:
    """The machine and the versions; what is older than is supported fails."""
    from packaging.version import Version

    names = ("torch", "accelerate", "deepspeed", "webdataset", "wandb", "numpy", "pillow")
    figures: dict[str, Any] = {name: _version(name) for name in names}
    figures["torch"] = torch.__version__  # with its build, which PyPI's metadata leave out
    figures |= {"python": platform.python_version(), "system": platform.platform(), "cores": os.cpu_count()}
    figures |= {"GPUs": GPUS, "CUDA": torch.version.cuda}
    if GPUS:
        memory = torch.cuda.get_device_properties(0).total_memory
        figures |= {"GPU": torch.cuda.get_device_name(), "GPU memory, GiB": round(memory / 2**30, 1)}
        figures |= {"NCCL": ".".join(map(str, torch.cuda.nccl.version()))}
        figures |= {"cuDNN": torch.backends.cudnn.version()}
    old = [f"torch {torch.__version__}"] if Version(torch.__version__) < Version("2.11") else []
    old += [f"Python {platform.python_version()}"] if sys.version_info < (3, 11) else []
    missing = [f"{name} is missing" for name in names if figures[name] == "missing"]
    return [f"{what} is too old" for what in old] + missing, figures
