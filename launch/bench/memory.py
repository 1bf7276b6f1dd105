"""`shardgan bench memory`: what each strategy holds per rank and sends per update, beside theory."""

from __future__ import annotations

from typing import Any

import click

from launch.bench import pair, table
from launch.bench.pair import Found
from pipeline.parallel import theory

_MIB = 2**20
_HELD = ("weights", "optimizer", "G_ema", "gradients")


@click.command("memory")
@pair.options(images=1)
def command(**options: Any) -> None:
    """MiB per rank of weights, optimizer state, G_ema and gradients, and MiB sent per rank and update.

    Trains a residual pair for three updates on made-up images. Prints a line of JSON per launch, then a
    table: measured, and theory in brackets.
    """
    found = pair.measure("launch.bench.memory_worker", **options)
    table.show(
        f"MiB per rank; {pair.title(found)} in fp32, Adam",
        (*_HELD, "held in all", "sent per update"),
        map(_row, found),
        "Measured (theory). Held while a player steps, activations gone; gradients: with buckets and "
        "everything else.",
    )


def held(found: Found) -> dict[str, float]:
    """Bytes on one rank at the moment of D's or G's step, whichever holds more.

    Gradients: all that is neither weights, optimizer nor average, so buckets as well.
    """
    steps = found["at_step_D"], found["at_step_G"]
    names = {"gradients": "other"}
    return {name: max(step[names.get(name, name)] for step in steps) for name in _HELD}


def in_theory(found: Found) -> tuple[dict[str, float], float]:
    """Bytes held and sent by one rank, by theory."""
    job = found["strategy"], found["world"], found["parameters_G"], found["parameters_D"]
    return theory.held(*job), theory.sent(*job)


def _row(found: Found) -> list[str]:
    measured, (due, sent) = held(found), in_theory(found)
    cells = [(measured[name], due[name]) for name in _HELD]
    cells += [(sum(measured.values()), sum(due.values())), (sum(found["sent"].values()), sent)]
    name = f"{found['strategy']} x{found['world']}"
    return [name, *(f"{mine / _MIB:.1f} ({theirs / _MIB:.1f})" for mine, theirs in cells)]
