"""Numbers and names as messages show them."""

from __future__ import annotations

import difflib
import os
import re
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

NO_TERMINAL = 10_000  # columns of a log


def counted(number: int, noun: str) -> str:
    """1 image, 2,000 images, 2 processes."""
    ending = "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{ending * (number != 1)}"


def ranks_named(ranks: Iterable[int]) -> str:
    """rank 3; ranks 0, 2 to 7. In ascending order."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1][1:] = [rank]
        else:
            runs.append([rank])
    several = len(runs) > 1 or len(runs[0]) > 1
    return f"rank{'s' * several} {', '.join(' to '.join(map(str, run)) for run in runs)}"


def in_bytes(number: float) -> str:
    """980 B, 1.5 KiB, 12 MiB, 1,234.0 GiB."""
    for unit in ("B", "KiB", "MiB"):
        if number < 999.5:  # else it would be rounded to 1e+03
            return f"{number:.3g} {unit}"
        number /= 1024
    return f"{number:,.1f} GiB"


def in_millions(numbers: int) -> str:
    """Of parameters: 640, 0.05 M, 12.34 M."""
    return f"{numbers / 1e6:,.2f} M" if numbers >= 1e4 else f"{numbers:,}"


def in_kimg(kimg: float) -> str:
    """0, 37.5, 1050.048: to an image."""
    return f"{kimg:.3f}".rstrip("0").rstrip(".")


def columns() -> int:
    """Of the terminal ($COLUMNS, if set)."""
    return shutil.get_terminal_size((NO_TERMINAL, 24)).columns


def printable(text: str) -> str:
    """Names of files need not be UTF-8: escapes what cannot be encoded."""
    return text.encode(errors="backslashreplace").decode()


def why(error: Exception) -> str:
    """Of an OSError what went wrong alone: its text names a temporary file, or repeats the name."""
    return (isinstance(error, OSError) and error.strerror) or str(error)


def did_you_mean(path: str | Path, known: Iterable[str] = ()) -> str:
    """A hint for a path with nothing there: a known name, or one in the same folder, that is spelt alike."""
    folder, name = os.path.split(os.path.normpath(path))
    names = set() if folder else set(known)
    with suppress(OSError):
        names.update(os.listdir(folder or "."))  # noqa: PTH208  names alone
    near = difflib.get_close_matches(name, sorted(names), n=1)
    return printable(f" Did you mean {Path(folder, near[0])}?") if near else ""


def in_markdown(text: str) -> str:
    """A text of others, shown as it is, in a table too: not as HTML, emphasis, a link, a picture or maths."""
    return re.sub(r"([\\`*<|$~&]|\](?=\()|(?<!\w)_|_(?!\w))", r"\\\1", one_line(text))


def one_line(text: str) -> str:
    """Escapes everything in a text that is not printable."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in printable(text))


def in_time(value: float | tuple[float, float]) -> str:
    """A setting that may be scheduled: 0.001, or "0.001 → 0.0001" of [0.001, 0.0001]."""
    return " → ".join(f"{end:g}" for end in value) if isinstance(value, tuple) else f"{value:g}"


def setting(value: object, text: Callable[[str], str] = str) -> str:
    """A setting's value, as a config has it; – for none. text: what is shown of one that is a text."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(setting(entry, text) for entry in value)}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return "–" if value is None else text(str(value))
