"""Seeds for randomness inside networks (dropout), set in every round, and so cheaply."""

from __future__ import annotations

import torch


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed the default generators of the CPU and of `device`, to the same streams as torch.manual_seed.

    torch.manual_seed also visits all other kinds of accelerators and formats a traceback for each, which
    takes as long as tens of kernel launches.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(seed)
