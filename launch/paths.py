"""Paths on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pipeline.errors import expanded

DRAWINGS = (".png", ".svg", ".pdf")


class UserPath(click.Path):
    """Expands `~` where the shell does not, as in --out=~/x."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return expanded(str(super().convert(value, param, ctx)))


class DrawingPath(UserPath):
    """Where to write a drawing, in the format of its suffix."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = super().convert(value, param, ctx)
        if path.suffix.lower() not in DRAWINGS:
            self.fail(f"{path}: the name has to end in .png, .svg or .pdf.", param, ctx)
        return path
