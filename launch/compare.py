"""`shardgan compare`: a table of what sets runs apart."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from os.path import commonprefix  # of any texts
from pathlib import Path

import click

from launch.paths import DrawingPath, UserPath
from launch.plot import write
from pipeline.run.comparison import Column, Comparison
from pipeline.wording import in_markdown

_GAP = 2  # columns of the terminal between two of the table
_LONG = 24  # letters of a value that are shown, if these tell it from the others


@click.command()
@click.argument("runs", nargs=-1, required=True, type=UserPath(), metavar="RUN...")
@click.option(
    "--out",
    type=DrawingPath(),
    help="Draw real images and each run's newest, with scores, into this .png, .svg or .pdf.",
)
def compare(runs: tuple[Path, ...], out: Path | None) -> None:
    """Show the settings in which RUNs differ, and their scores; of a selection's folder, its trials.

    The lowest score is marked among runs that were scored against the same images. Where the output is not a
    terminal it is Markdown, with values in full.
    """
    from pipeline.run import comparison
    from pipeline.run.history import read_histories

    histories = read_histories(runs)
    table = comparison.compare(histories)
    if sys.stdout.isatty():
        _print(table)
    else:
        click.echo(markdown(table))
    if out:
        from pipeline.run import strip

        write(strip.draw(histories), out)


def markdown(table: Comparison) -> str:
    """The table, a line per run, and its notes."""
    named = [Column("run", table.names), *table.columns]
    rows = [[column.title for column in named], ["---"] * len(named)]
    for place in range(len(table.names)):
        cells = [in_markdown(column.cells[place]) for column in named]
        best = [place in column.best for column in named]
        rows.append([f"**{cell}**" if bold else cell for cell, bold in zip(cells, best, strict=True)])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines, *(f"\n{note}" for note in table.notes)])


def blocks(table: Comparison, width: int) -> list[list[Column]]:
    """Columns, cut where they are long, in blocks that fit into so many columns of a terminal. Each block
    begins with the names."""
    names = Column("run", _shortened(table.names, max(width // 2, 12)))
    found = [[names]]
    for column in table.columns:
        column = Column(column.title, _shortened(column.cells, _LONG), column.best)
        if len(found[-1]) > 1 and _width([*found[-1], column]) > width:
            found.append([names])
        found[-1].append(column)
    return found


def _print(table: Comparison) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    for columns in blocks(table, console.width):
        shown = Table(box=None, padding=(0, _GAP, 0, 0), pad_edge=False, header_style="bold")
        for number, column in enumerate(columns):
            title = Text("\n".join(_title(column)))
            shown.add_column(title, justify="right" if number else "left", vertical="bottom", overflow="fold")
        for place in range(len(table.names)):
            looks = ["bold green" if place in column.best else "" for column in columns]
            cells = [c.cells[place] + ("*" if place in c.best else " " if c.best else "") for c in columns]
            shown.add_row(*(Text(cell, style) for cell, style in zip(cells, looks, strict=True)))
        console.print(shown)
        console.print()
    best = ["* The lowest among runs whose scores compare."] if any(c.best for c in table.columns) else []
    for note in [*best, *table.notes]:
        console.print(Text(note))


def _width(columns: Sequence[Column]) -> int:
    from rich.cells import cell_len

    cells = ([f"{cell}*" if column.best else cell for cell in column.cells] for column in columns)
    texts = ([*_title(column), *below] for column, below in zip(columns, cells, strict=True))
    return sum(max(map(cell_len, lines)) for lines in texts) + _GAP * (len(columns) - 1)


def _title(column: Column) -> list[str]:
    """In lines: kid_efflite0, lowest (kimg); penalty., r1.gamma; precision_, efflite0."""
    for mark in " ._":
        before, found, after = column.title.partition(mark)
        if found and (mark == " " or len(column.title) > 12):
            return [f"{before}{mark}".strip(), after]
    return [column.title]


def _shortened(texts: Sequence[str], letters: int) -> tuple[str, ...]:
    """Without what all begin and end with if one is longer, and then cut in the middle to so many letters, or
    to as many as tell them apart."""
    different, longest = len(set(texts)), max(map(len, texts), default=0)
    if longest > letters and different > 1:
        head = max(len(commonprefix(texts)) - 3, 0)  # noqa: RUF071
        tail = max(len(commonprefix([text[head:][::-1] for text in texts])) - 3, 0)  # noqa: RUF071
        texts = [f"{'…' * (head > 0)}{text[head : len(text) - tail]}{'…' * (tail > 0)}" for text in texts]
    for most in range(letters, max(map(len, texts), default=0)):
        cut = tuple(_cut(text, most) for text in texts)
        if len(set(cut)) == different:
            return cut
    return tuple(texts)


def _cut(text: str, most: int) -> str:
    left = (most - 1) // 2
    return text if len(text) <= most else f"{text[:left]}…{text[len(text) - (most - 1 - left) :]}"
