"""The candidates of `shardgan select`: every combination of a grid, or arms with names."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import yaml
from omegaconf.errors import OmegaConfBaseException

from pipeline.config import Config, UserError
from pipeline.config_layers import from_yaml, why_not_yaml

_LONGEST = 200  # bytes of a slug: a file's name has 255, which seed, fold and suffix share
_MOST = 1000  # values of a range
_PAIR = re.compile(r"\[\s*([^\s,\[\]]+)\s*,\s*([^\s,\[\]]+)\s*\]")
_SCHEDULABLE = {*Config().schedulable, "penalty.l2", "penalty.l1"}


@dataclass(frozen=True)
class Arm:
    """One candidate: the settings (key=value) that it changes."""

    name: str
    settings: tuple[str, ...]
    values: Mapping[str, str] = field(hash=False)  # key → value as written; empty for named arms

    @property
    def slug(self) -> str:
        """The name as part of a folder's, which no dot may begin; a long one is cut and ends in a hash."""
        changes = [f"{key}={in_time(key, value, 'to')}" for key, value in self.values.items()]
        slug = re.sub(r"[^\w.=+,-]+", "_", (", ".join(changes) or self.name).replace(", ", ",")).lstrip(".")
        if len(slug.encode()) <= _LONGEST:
            return slug
        digest = hashlib.sha256(slug.encode()).hexdigest()[:8]
        return f"{slug.encode()[: _LONGEST - 9].decode(errors='ignore')}-{digest}"

    @property
    def label(self) -> str:
        """The values of a grid, each with the part of its key that sets it apart; else the name."""
        values = [in_time(key, value, " → ") for key, value in self.values.items()]
        if len(values) < 2:
            return values[0] if values else self.name
        _, keys, _ = _common(list(self.values))
        return ", ".join(f"{key} {value}" for key, value in zip(keys, values, strict=True))

    @property
    def title(self) -> str:
        """A heading for labels: the keys of a grid, as penalty.{G,D}.l2."""
        if len(self.values) < 2:
            return next(iter(self.values), "candidate")
        before, keys, behind = _common(list(self.values))
        return f"{before}{{{','.join(keys)}}}{behind}" if before or behind else "candidate"

    def number(self, key: str) -> float | None:
        """A grid's value as a number, if it is one."""
        try:
            return float(self.values[key].strip("'\""))
        except ValueError:
            return None


def grid(axes: Sequence[str]) -> list[Arm]:
    """Every combination of axes `KEY=V1,V2,…`, where 1e-6:1e-2:5 is 5 values evenly spaced in log.

    Raises UserError for an axis that cannot be read.
    """
    parsed = [_axis(text) for text in axes]
    if len({key for key, _ in parsed}) < len(parsed):
        raise UserError("--grid: each key once, with its values separated by commas.")
    arms = []
    for combination in product(*(values for _, values in parsed)):
        arms.append(arm_of(dict(zip((key for key, _ in parsed), combination, strict=True))))
    return arms


def arm_of(values: Mapping[str, str]) -> Arm:
    """The candidate with these values, key → as written."""
    settings = tuple(f"{key}={value}" for key, value in values.items())
    return Arm(", ".join(settings), settings, values)


def arms(file: Path) -> list[Arm]:
    """Arms from a YAML file of `name: [key=value, …]`. Raises UserError if it is not one."""
    text = ""
    try:
        text = file.read_text(encoding="utf-8")
        content = from_yaml(text)
    except OSError as error:
        raise UserError(f"--arms {file} cannot be read: {error.strerror or error}.") from None
    except (UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"--arms {file} cannot be read: {why_not_yaml(error, text)}") from None
    if not isinstance(content, dict) or not content:
        raise UserError(f"--arms {file}: not a list of arms, each as `name: [key=value, …]`.")
    for name, settings in content.items():
        if not _is_settings(settings):
            raise UserError(f"--arms {file}: {name} has no list of settings, as `{name}: [key=value, …]`.")
    return [Arm(" ".join(str(name).split()), tuple(settings), {}) for name, settings in content.items()]


def _axis(text: str) -> tuple[str, list[str]]:
    key, equals, values = text.partition("=")
    if not (key.strip() and equals and values.strip()):
        raise UserError(f"--grid {text}: not of the form KEY=V1,V2,…")
    found = [value for part in _split(values, text) for value in _range(part, text)]
    return key.strip(), list(dict.fromkeys(found))


def _split(values: str, axis: str) -> list[str]:
    """Split at the commas outside brackets and quotes, as YAML does; each value stays as it was written."""
    listed = f"[{values}]"
    try:
        node = yaml.compose(listed, yaml.SafeLoader)
    except yaml.YAMLError:
        node = None
    if node is None and "${" in values:
        raise UserError(
            f"--grid {axis}: a value with ${{ must be in quotes, as in \"KEY='${{section.key}}',0\"; or a "
            "bracket or quote is not closed."
        )
    if node is None or values.rstrip().endswith(","):
        raise UserError(
            f"--grid {axis}: a value is missing beside a comma, or a bracket or quote is not closed."
        )
    return [listed[node.start_mark.index : node.end_mark.index] for node in node.value]


def _range(part: str, axis: str) -> list[str]:
    """LOW:HIGH:COUNT → COUNT values evenly spaced in log; anything else → itself."""
    if is_range(part):
        raise UserError(f"--grid {axis}: {part} is a range to search in: add --search tpe --trials N.")
    if ":" not in part:
        return [shortest(part)]
    try:
        low, high, count = part.split(":")
        start, end, steps = math.log(float(low)), math.log(float(high)), int(count) - 1
        if not 1 <= steps < _MOST or not math.isfinite(start + end):
            raise ValueError
    except ValueError:
        if not re.match(r"[\d.+-]", part):
            return [part]  # package.module:Class
        raise UserError(
            f"--grid {axis}: {part} is not LOW:HIGH:COUNT with 0 < LOW and 2 ≤ COUNT ≤ {_MOST}, as in "
            "1e-6:1e-2:5."
        ) from None
    between = (math.exp(start + (end - start) * i / steps) for i in range(1, steps))
    return [shortest(low), *(shortest(f"{value:.6g}") for value in between), shortest(high)]


def is_range(values: str) -> bool:
    """Whether it is LOW..HIGH."""
    return re.fullmatch(r"[\d.e+-]*\d\.?\.\.[\d.e+-]+", values.strip(), re.IGNORECASE) is not None


def shortest(written: str) -> str:
    """A number in its shortest form: 1e-3 and 0.001 are one value and one folder. Words stay as they are."""
    if re.fullmatch(r"[+-]?\d+", written):
        return str(int(written))
    try:
        value = float(written)
    except ValueError:
        return written
    short = f"{value:g}"
    return short if float(short) == value or math.isnan(value) else repr(value)


def in_time(key: str, written: str, arrow: str) -> str:
    """[1, 0.1] of a setting that may be scheduled as 1 → 0.1; anything else as it is written."""
    if key.endswith(".betas"):  # each of two may be scheduled
        within = _PAIR.sub(lambda pair: f"{pair[1]}{arrow}{pair[2]}", written.strip()[1:-1])
        return f"[{within}]"
    pair = _PAIR.fullmatch(written) if key in _SCHEDULABLE else None
    return f"{pair[1]}{arrow}{pair[2]}" if pair else written


def _common(keys: Sequence[str]) -> tuple[str, list[str], str]:
    """Dotted keys as their common beginning, the parts that differ, and their common end."""
    split = [key.split(".") for key in keys]
    shortest = min(map(len, split))
    before = next((n for n in range(shortest) if len({parts[n] for parts in split}) > 1), shortest - 1)
    left = shortest - before
    behind = next((n for n in range(left) if len({parts[-1 - n] for parts in split}) > 1), left - 1)
    middle = [".".join(parts[before : len(parts) - behind]) for parts in split]
    start, end = split[0][:before], split[0][len(split[0]) - behind :]
    return "".join(f"{part}." for part in start), middle, "".join(f".{part}" for part in end)


def _is_settings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) and "=" in entry for entry in value)
