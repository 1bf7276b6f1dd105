"""`sources.txt` of a data folder: of each sample's key, the file that it was made of."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from pipeline.wording import one_line

SOURCES = "sources.txt"


def write_origins(folder: Path, origins: Iterable[tuple[str, str]]) -> None:
    """A line `KEY<tab>PATH` per sample. Paths are relative to the source of the images."""
    with (folder / SOURCES).open("w", encoding="utf-8") as file:
        file.writelines(f"{key}\t{one_line(path)}\n" for key, path in origins)


def read_origins(folder: Path, keys: Collection[str]) -> Mapping[str, str]:
    """Paths by key, for those of `keys` that are listed; none if there is no such file."""
    found: dict[str, str] = {}
    with suppress(OSError), (folder / SOURCES).open(encoding="utf-8", errors="replace") as file:
        for line in file:
            key, _, path = line.rstrip("\n").partition("\t")
            if key in keys:
                found[key] = one_line(path)
    return found
