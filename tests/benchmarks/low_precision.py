"""What an update's maths takes in bf16 on this CPU, relative to float32; one thread:

    python tests/benchmarks/low_precision.py CONFIG …

Forward and backward passes of D on two batches and of G through D, without penalties; processor time.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from torch import nn

from pipeline.config import load
from pipeline.gan.networks import build_D, build_G


def update(G: nn.Module, D: nn.Module, z: torch.Tensor) -> None:
    with torch.no_grad():
        fakes = G(z)
    (D(fakes).float() - D(torch.randn_like(fakes)).float()).sum().backward()
    D(G(z)).float().sum().backward()


def seconds(G: nn.Module, D: nn.Module, z: torch.Tensor, low: bool) -> float:
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        update(G, D, z)
        start = time.process_time()
        for _ in range(3):
            update(G, D, z)
    return (time.process_time() - start) / 3


def main(paths: list[str]) -> None:
    torch.set_num_threads(1)
    for path in paths:
        config = load(path, [])
        G, D = build_G(config, 0), build_D(config, 0)
        z = torch.randn(32, config.G.z_dim)
        plain, low = seconds(G, D, z, False), seconds(G, D, z, True)
        print(f"{Path(path).stem}: float32 {plain:.3f} s, bf16 {low:.3f} s, {low / plain:.1f} times")


main(sys.argv[1:])
