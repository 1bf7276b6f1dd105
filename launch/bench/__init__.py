"""`shardgan bench …`: side-by-side measurements."""

from __future__ import annotations

import click

from launch.lazy import LazyGroup

_COMMANDS = {
    "loader": ("launch.bench.loader:command", "Images per CPU-second of our reader and of webdataset's."),
    "memory": ("launch.bench.memory:command", "What each strategy holds per rank and sends per update."),
    "penalty": ("launch.bench.penalty:command", "What L2 adds to a training step."),
    "step": ("launch.bench.step:command", "The whole step, its bare maths and the tutorials' DCGAN loop."),
}


@click.command(cls=LazyGroup, table=_COMMANDS)
def bench() -> None:
    """Measure what this software costs, compared with something simpler or with theory."""
