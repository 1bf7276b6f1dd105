"""Command groups that import a command when it is called: showing help must not take torch's seconds."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import click

from pipeline.garbage import importing


class LazyGroup(click.Group):
    """table: command → ("module:function", one line of help), in the order of the help."""

    def __init__(self, *args: Any, table: Mapping[str, tuple[str, str]], **how: Any) -> None:
        super().__init__(*args, **how)
        self._table = table

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._table:
            return None
        module, _, function = self._table[cmd_name][0].partition(":")
        with importing():
            command: click.Command = getattr(importlib.import_module(module), function)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in self._table.items()])
