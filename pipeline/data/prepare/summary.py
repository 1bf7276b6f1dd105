"""What became of every file of a source: the summary that prepare prints, skipped.txt and sources.txt."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.data.index import Index
from pipeline.data.prepare.labels import some
from pipeline.data.prepare.listing import LeftOut, by_kind
from pipeline.data.prepare.pictures import SIDE
from pipeline.data.prepare.source import Resolved, Source
from pipeline.wording import one_line

_SKIPPED = "skipped.txt"
_SOURCES = "sources.txt"
_SAID = 10  # of its lines are shown
_NAMED = 12  # classes are listed one by one


@dataclass(frozen=True)
class Summary:
    """What was made of a source. `facts` counts images by what was done to them (see pictures.fitted)."""

    index: Index
    options: Resolved
    images: Source
    facts: Mapping[str, int]
    left_out: Sequence[LeftOut]

    def lines(self) -> Iterator[str]:
        """What was made, for people."""
        size, labelled = self.options.size, self.images.labelled
        shape = f"{size}x{size}" if self.options.latents is None else "x".join(map(str, self.options.latents))
        yield f"{shape}: {', '.join(self._images())}"
        yield from self._sides()
        if labelled.classes:
            yield f"classes, from {labelled.origin}: {self._classes()}"
        yield from labelled.remarks
        if self.left_out:
            count = sum(item.count for item in self.left_out)
            yield f"left out: {count:,} ({by_kind(self.left_out)}), listed in {_SKIPPED}"
        if self.images.tables:
            tables = some(self.images.tables)
            yield f"not read: {tables} (labels are taken from folders, or `labels` of a dataset.json)"
        if copies := self.facts.get("copies"):
            are = "image is a copy" if copies == 1 else "images are copies"
            yield f"{copies:,} {are} of another one: --dedupe leaves them out"

    def next_line(self, out: str) -> str:
        """The command that trains on it. `out` is what they called the folder."""
        train = shlex.quote(out)
        if self.options.latents is None:
            return f"Next: shardgan train {train}"
        return (
            f"Next: shardgan train CONFIG data.train={train} data.size={self.options.size} "
            f"data.channels={self.options.latents[0]} data.decoder=package.module:Class"
        )

    def _images(self) -> Iterator[str]:
        said = {
            "float16": "latents in float16",
            "float32": "latents in float32",
            "colour": "in colour",
            "grey": "in grey",
            "transparent": f"with transparency, laid on {self.options.background or 'white'}",
            "converted": "with a colour profile, converted to sRGB",
            "padded": f"padded with {self.options.background or 'black'}",
            "cropped": "cropped to a square",
            "stretched": "stretched to a square",
            "enlarged": f"smaller than {self.options.size} and enlarged",
            "first of several": "of several frames or pages: the first is used",
        }
        return (f"{self.facts[fact]:,} {text}" for fact, text in said.items() if self.facts.get(fact))

    def _sides(self) -> Iterator[str]:
        """The images' shorter sides before, unless all are of the wanted size."""
        counts = {int(f.removeprefix(SIDE)): n for f, n in self.facts.items() if f.startswith(SIDE)}
        if counts.keys() - {self.options.size}:
            values, weights = zip(*sorted(counts.items()), strict=True)
            median = values[int(np.searchsorted(np.cumsum(weights), sum(weights) / 2))]
            yield f"shorter sides before: {between(values[0], values[-1], median)}"

    def _classes(self) -> str:
        counts = Counter[int]()
        for shard in self.index.shards:
            counts.update(shard.labels)
        names = self.images.labelled.classes
        each = [counts[label] for label in range(len(names))]
        numbers = all(name == str(label) for label, name in enumerate(names))
        if len(names) <= _NAMED and not numbers:
            return ", ".join(f"{label} = {name} ({each[label]:,})" for label, name in enumerate(names))
        shown = (
            "numbers" if numbers else f"0 = {names[0]}, 1 = {names[1]}, ... {len(names) - 1} = {names[-1]}"
        )
        spread = f"{min(each):,}" + f" to {max(each):,}" * (max(each) > min(each))
        return f"{shown}, of {spread} image{'s' * (max(each) != 1)} each"


def between(least: int, most: int, median: int) -> str:
    """A range of pixels: 512, or 64 to 512 (median 128)."""
    return f"{least:,}" if least == most else f"{least:,} to {most:,} (median {median:,})"


def list_left_out(
    folder: Path, skipped: Sequence[LeftOut], others: Sequence[LeftOut], announce: Callable[[str], None]
) -> None:
    """Write skipped.txt. What looked like an image, and is none, is said at once."""
    lines = [one_line(" ".join(f"{item.name}: {item.reason}".split())) for item in (*skipped, *others)]
    if lines:
        (folder / _SKIPPED).write_text("".join(f"{line}\n" for line in lines), "utf-8")
    if skipped:
        are = "image could not be read and is" if len(skipped) == 1 else "images could not be read and are"
        announce(f"{len(skipped):,} {are} left out ({_SKIPPED} lists them):")
    for line in lines[: min(len(skipped), _SAID)]:
        announce(f"  {line}")
    if len(skipped) > _SAID:
        announce(f"  … and {len(skipped) - _SAID:,} more")


def write_origins(folder: Path, origins: Iterable[tuple[str, str]]) -> None:
    """Write sources.txt: a line `KEY<tab>PATH` per sample. Paths are relative to the images' source."""
    with (folder / _SOURCES).open("w", encoding="utf-8") as file:
        file.writelines(f"{key}\t{one_line(path)}\n" for key, path in origins)


def read_origins(folder: Path, keys: Collection[str]) -> Mapping[str, str]:
    """Paths by key, for those of `keys` that are listed; none if there is no such file."""
    found: dict[str, str] = {}
    with suppress(OSError), (folder / _SOURCES).open(encoding="utf-8", errors="replace") as file:
        for line in file:
            key, _, path = line.rstrip("\n").partition("\t")
            if key in keys:
                found[key] = one_line(path)
    return found
