"""How long updates of several ranks take, beside doctor's forecast: one rank's time, and bytes over rate.

    python tests/benchmarks/forecast.py [--procs 2,4] [--strategies ddp,fsdp2] [--params 5e6]

All three are measured in one launch, in turn, so that they share what else the machine does.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

import click
import torch

from launch.bench import pair, table
from launch.bench.memory import in_theory
from launch.bench.meter import Traffic, clocked
from launch.doctor import alone
from pipeline.run.stats import Stats
from pipeline.step import train_step

_TURNS, _NUMBERS = 7, 2**23  # fp32 numbers in an all-reduce


@click.command()
@pair.options(images=1)
def command(**options: Any) -> None:
    found = pair.measure("tests.benchmarks.forecast", **options)
    headings = ("one rank", "together", "more", "bytes / rate", "ratio", "of forecast", "sent / theory")
    table.show(
        f"{pair.title(found)}, an image per rank, seconds",
        headings,
        map(_row, found),
        "Medians of seven turns.",
    )


def _row(found: pair.Found) -> list[str]:
    _, due = in_theory(found)
    single, together, network = found["alone"], found["together"], due / found["rate"]
    cells = [single, together, together - single, network]
    ratio = (together - single) / network if network else 0.0
    cells += [ratio, together / (single + network), found["sent"] / due if due else 0.0]
    return [f"{found['strategy']} x{found['world']}", *(f"{cell:.3g}" for cell in cells)]


def main(out: Path, settings: list[str]) -> None:
    """In a rank."""
    ranks, gan, reals, found = pair.begin(settings)
    stats, numbers = Stats(ranks.device), torch.ones(_NUMBERS, device=ranks.device)
    single, _ = alone.second_update(
        pair.config_of(settings), gan.batch_size // ranks.world, ranks.precision, 0, ranks.device
    )

    def together() -> None:
        train_step(gan, reals, 0, stats)

    for _ in range(2):  # what is settled in the first updates has been
        together()
    with Traffic() as traffic:
        together()
    made = {"alone": single, "together": together, "reduce": lambda: ranks.sum(numbers)}
    times: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(_TURNS):
        for name, make in made.items():
            ranks.barrier()
            with clocked(times[name]):
                make()
                ranks.barrier()
    medians = {name: statistics.median(each) for name, each in times.items()}
    sent = 2 * 4 * _NUMBERS * (ranks.world - 1) / ranks.world
    found |= {name: medians[name] for name in ("alone", "together")}
    found |= {"rate": sent / medians["reduce"], "sent": sum(traffic.sent.values())}
    pair.end(ranks, out, found)


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1].endswith(".json"):
        main(Path(sys.argv[1]), sys.argv[2:])
    else:
        command()
