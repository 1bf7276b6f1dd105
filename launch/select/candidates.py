"""The candidates of `shardgan select`: every combination of a grid, or arms with names."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import yaml

from pipeline.config import UserError


@dataclass(frozen=True)
class Arm:
    """One candidate: the settings it changes."""

    name: str
    settings: tuple[str, ...]
    values: Mapping[str, str] = field(hash=False)  # of a grid: key → value as written; of named arms: empty

    @property
    def slug(self) -> str:
        """The name, as part of a folder's."""
        return re.sub(r"[^\w.=+,-]+", "_", self.name.replace(", ", ","))

    def number(self, key: str) -> float | None:
        """A grid's value as a number, if it is one."""
        try:
            return float(self.values[key])
        except ValueError:
            return None


def grid(axes: Sequence[str]) -> list[Arm]:
    """Every combination of axes `KEY=V1,V2,…`, where 1e-6:1e-2:5 stands for 5 values evenly spaced in log.

    Raises UserError for an axis that cannot be read.
    """
    parsed = [_axis(text) for text in axes]
    if len({key for key, _ in parsed}) < len(parsed):
        raise UserError("--grid: each key once; several values go behind one, with commas between.")
    arms = []
    for combination in product(*(values for _, values in parsed)):
        values = dict(zip((key for key, _ in parsed), combination, strict=True))
        settings = tuple(f"{key}={value}" for key, value in values.items())
        arms.append(Arm(", ".join(settings), settings, values))
    return arms


def arms(file: Path) -> list[Arm]:
    """Arms from a YAML file of `name: [key=value, …]`. Raises UserError if it is not one."""
    try:
        content = yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--arms {file} cannot be read: {' '.join(str(error).split())}") from None
    listed = content.items() if isinstance(content, dict) else ()
    found = [Arm(str(name), tuple(settings), {}) for name, settings in listed if _is_settings(settings)]
    if len(found) < max(1, len(listed)):
        raise UserError(f"--arms {file}: not a list of arms, each as `name: [key=value, …]`.")
    return found


def _axis(text: str) -> tuple[str, list[str]]:
    key, equals, values = text.partition("=")
    if not (key and equals and values):
        raise UserError(f"--grid {text}: not of the form KEY=V1,V2,…")
    found = [value for part in values.split(",") for value in _range(part.strip(), text)]
    return key, list(dict.fromkeys(found))


def _range(part: str, axis: str) -> list[str]:
    """LOW:HIGH:COUNT → so many values, or the value itself."""
    if ":" not in part:
        return [_shortest(part)]
    try:
        low, high, count = part.split(":")
        start, end, steps = math.log(float(low)), math.log(float(high)), int(count) - 1
        if steps < 1 or not math.isfinite(start + end):
            raise ValueError
    except ValueError:
        if not re.match(r"[\d.+-]", part):
            return [part]  # a word, as package.module:Class
        raise UserError(
            f"--grid {axis}: {part} is not LOW:HIGH:COUNT with 0 < LOW and 2 ≤ COUNT, as in 1e-6:1e-2:5."
        ) from None
    between = (math.exp(start + (end - start) * i / steps) for i in range(1, steps))
    return [_shortest(low), *(f"{value:.6g}" for value in between), _shortest(high)]


def _shortest(written: str) -> str:
    """A number in its shortest form: 1e-3 and 0.001 are one value and one folder. Words stay as they are."""
    if re.fullmatch(r"[+-]?\d+", written):
        return str(int(written))
    try:
        value = float(written)
    except ValueError:
        return written
    short = f"{value:g}"
    return short if float(short) == value or math.isnan(value) else repr(value)


def _is_settings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) and "=" in entry for entry in value)
