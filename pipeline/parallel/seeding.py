"""Seeds for what networks draw themselves (dropout), set once per round and so set cheaply."""

from __future__ import annotations

import torch


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed the default generators of the CPU and of `device`: the streams that torch.manual_seed gives.

    torch.manual_seed would also visit every other kind of accelerator, each time formatting a traceback for
    a later error message, which costs as much as some tens of kernel launches.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(seed)
