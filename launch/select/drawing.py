"""What the pictures of a selection have in common: colours, names that fit, and a place for them."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from launch.select.choice import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, DARK, LIGHT, GREY, MARK = "#222222", "#1f4e79", "#9bb7d4", "#999999", "#c05020"


def new_figure(width: float, height: float) -> Figure:
    """An empty one; width, height: in inches. At this resolution matplotlib draws up to 595 of them."""
    from matplotlib.figure import Figure

    return Figure(figsize=(min(width, 400), min(height, 400)), dpi=110, layout="constrained")


def wrapped(name: str, letters: int) -> str:
    """A name in up to three lines of so many letters. Where two $ stand in a text, matplotlib reads a
    formula."""
    lines = textwrap.wrap(name, letters, max_lines=3, placeholder="…") or [""]
    return "\n".join(lines).replace("$", r"\$")


def numbers(rows: Sequence[Row]) -> list[float]:
    """The values of a grid over one number; empty for anything else."""
    found = [row.arm.number(key) for row in rows for key in row.arm.values]
    one = all(len(row.arm.values) == 1 for row in rows)
    return [x for x in found if x is not None] if one and None not in found else []
