"""Paths on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


class UserPath(click.Path):
    """Expands `~` where the shell does not, as in --out=~/x."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return Path(str(super().convert(value, param, ctx))).expanduser()
        except RuntimeError:
            self.fail(f"{value}: there is no such home folder; write the path out.", param, ctx)
