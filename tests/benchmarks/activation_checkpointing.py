"""What activation checkpointing saves of memory and costs in time, in an update of vit-small.yaml:

    python tests/benchmarks/activation_checkpointing.py

MiB are those that doctor traces, seconds the processor time of an update on one thread.
"""

from __future__ import annotations

import statistics
import time

import torch

from launch.doctor.alone import second_update
from launch.doctor.memory import activations
from launch.installed import config_path
from pipeline.config import load

IMAGES = 8
FRACTION = [f"penalty.{r}.fraction=1/4" for r in ("r1", "r2")]
OBJECTIVES = {
    "relativistic": ["penalty.r1.gamma=0", "penalty.r2.gamma=0"],
    "and R1 + R2 by finite difference, a quarter of the batch": [
        *FRACTION,
        "penalty.r1.sigma=0.1",
        "penalty.r2.sigma=0.1",
    ],
    "and R1 + R2, exact, a quarter of the batch": FRACTION,
    "and R1 + R2, exact": ["penalty.r1.fraction=1", "penalty.r2.fraction=1"],
}


def measured(settings: list[str]) -> str:
    how = load(config_path("vit-small"), settings), IMAGES, "no", 0
    update, _ = second_update(*how)
    seconds = []
    for _ in range(9):
        start = time.process_time()
        update()
        seconds.append(time.process_time() - start)
    return f"{activations(*how) / 2**20:.1f}, {statistics.median(seconds):.2f} s"


def main() -> None:
    torch.set_num_threads(1)
    print("| | kept | computed again |\n|---|---:|---:|")
    for name, settings in OBJECTIVES.items():
        kept, again = (
            measured([*settings, f"G.checkpoint={on}", f"D.checkpoint={on}"]) for on in ("false", "true")
        )
        print(f"| {name} | {kept} | {again} |", flush=True)


main()
