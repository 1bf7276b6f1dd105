"""The tables that measurements are printed as."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table


def show(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]], note: str) -> None:
    """Each row begins with its name, which has no heading."""
    table = Table(title=title)
    table.add_column()
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.print(table)
    console.print(note)
