"""The GPUs of this machine, as far as trainings use them. Nothing here needs torch before it is called."""

from __future__ import annotations

import os

from pipeline.errors import UserError
from pipeline.parallel.environment import flag


def gpus() -> int:
    """How many there are; 0: a training is on CPUs, as there are none or ACCELERATE_USE_CPU asks for it.

    Raises UserError for GPUs that this torch can count but not use: the training would quietly be on CPUs.
    """
    import torch

    found = 0 if flag(os.environ, "ACCELERATE_USE_CPU") else torch.cuda.device_count()
    if found and not torch.cuda.is_available():
        raise UserError(
            f"torch {torch.__version__} cannot use this machine's GPUs ({found}), most likely because their "
            "driver is too old for it (`nvidia-smi` shows which CUDA it supports). Install a torch for that "
            "CUDA or a newer driver; ACCELERATE_USE_CPU=1 trains on CPUs."
        )
    return found


def on_gpu() -> bool:
    """Whether a training on this machine is on GPUs. Raises UserError as `gpus`."""
    return gpus() > 0
