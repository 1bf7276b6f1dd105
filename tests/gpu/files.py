"""Parts of the GPU suite that measure reading shards and writing checkpoints."""

from __future__ import annotations

import statistics

from machine import GPUS, WORLD, Outcome
from starting import Failed, launch


def loader() -> Outcome:
    """`shardgan bench loader`, in images per CPU-second."""
    from launch.bench import loader

    found = loader.measure(turns=3, images=250)
    return [], {
        name: {who: round(statistics.median(each)) for who, each in speeds.items()}
        for name, speeds in found.items()
    }


def saves() -> Outcome:
    """How long a save keeps training waiting: tests/benchmarks/save.py."""
    figures = {}
    for strategy in ("ddp", "fsdp2", "zero3"):
        try:
            printed = launch(strategy, WORLD, ["save", "20e6" if GPUS else "2e6"])
        except Failed as reason:
            return [str(reason)], figures
        (said,) = (line for line in printed.splitlines() if line.startswith(f"{strategy} x{WORLD},"))
        figures[f"{strategy} x{WORLD}"] = said.partition(": ")[2]
    return [], figures
