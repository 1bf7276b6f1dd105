"""`shardgan bench …`: side-by-side measurements. Each imports what it measures only when it is run."""

from __future__ import annotations

import importlib

import click

_COMMANDS = {
    "loader": "launch.bench.loader",
    "memory": "launch.bench.memory",
    "penalty": "launch.bench.penalty",
    "save": "launch.bench.save",
    "step": "launch.bench.step",
}


class _Lazy(click.Group):
    """Sub-commands by name; listing them imports no torch, and running one imports only that one."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = importlib.import_module(_COMMANDS[cmd_name]).command
        return command


@click.command(cls=_Lazy)
def bench() -> None:
    """Measure what this software costs: beside something simpler, or beside what theory says."""
