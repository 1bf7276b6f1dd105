"""What `shardgan select --search` searches in: LOW..HIGH of a number, or values to pick from."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from omegaconf.errors import OmegaConfBaseException

from launch.select.candidates import grid, is_range, shortest
from launch.select.choice import LAMBDA
from pipeline.config import Config, UserError
from pipeline.config_layers import from_yaml, is_setting, is_whole

_DECADE = 10.0  # HIGH / LOW from which on a range is searched in log
_DIGITS = 4  # of a proposed value


@dataclass(frozen=True)
class Axis:
    """Values to pick from."""

    key: str
    values: tuple[str, ...] = ()

    @property
    def penalty(self) -> bool:
        """Whether it is a λ."""
        return LAMBDA.fullmatch(self.key) is not None

    @property
    def text(self) -> str:
        """As on the command line."""
        return f"{self.key}={','.join(self.values)}"

    @property
    def ends(self) -> Sequence[str]:
        """Values that the config must accept."""
        return self.values

    @property
    def size(self) -> float:
        """How many values there are."""
        return len(self.values)

    def distribution(self, of: Any) -> Any:
        """of: optuna.distributions."""
        return of.CategoricalDistribution(self.values)

    def written(self, value: Any) -> str:
        """A proposed value as it stands in a setting."""
        return str(value)

    def read(self, written: str) -> Any:
        """The other way round, however it is written; None for what does not lie in it, as λ = 0 in a range
        in log."""
        return next((value for value in self.values if _meaning(value) == _meaning(written)), None)

    def spelled(self, written: str) -> str:
        """A value as it stands in the list, if it does."""
        return self.read(written) or written


@dataclass(frozen=True)
class Range(Axis):
    """Numbers from low to high, both included."""

    low: float = 0.0
    high: float = 1.0
    whole: bool = False

    @property
    def log(self) -> bool:
        """Whether it spans a decade or more; then it is searched evenly in log."""
        return self.low > 0 and self.high >= _DECADE * self.low

    @property
    def text(self) -> str:
        return f"{self.key}={'..'.join(self.ends)}"

    @property
    def ends(self) -> Sequence[str]:
        return self.written(self.low), self.written(self.high)

    @property
    def size(self) -> float:
        return self.high - self.low + 1 if self.whole else math.inf

    def distribution(self, of: Any) -> Any:
        if self.whole:
            return of.IntDistribution(int(self.low), int(self.high), log=self.log)
        return of.FloatDistribution(self.low, self.high, log=self.log)

    def written(self, value: Any) -> str:
        if self.whole:
            return str(int(value))
        within = value if value in (self.low, self.high) else float(f"{value:.{_DIGITS}g}")
        return shortest(repr(min(max(within, self.low), self.high)))

    def read(self, written: str) -> Any:
        try:
            value = int(written) if self.whole else float(written)
        except ValueError:
            return None
        return value if self.low <= value <= self.high else None

    def spelled(self, written: str) -> str:
        return written


def axes_of(texts: Sequence[str], base: Config) -> list[Axis]:
    """Axes of --grid, KEY=LOW..HIGH or KEY=V1,V2,… each.

    base: the config without them; a setting that is a whole number there is one. Raises UserError.
    """
    axes = [_axis(text, base) for text in texts]
    if len({axis.key for axis in axes}) < len(axes):
        raise UserError("--grid: each key once.")
    if not any(isinstance(axis, Range) for axis in axes):
        raise UserError("--search needs a range, as in --grid penalty.l2=1e-6..1e-1.")
    return axes


def own_value(key: str, base: Config) -> str | None:
    """A setting of the config as one would write it; None for an option that is not set there."""
    found = _lookup(key, base)
    if found is None:
        return "null" if is_setting(key, Config) else None
    if isinstance(found, str):
        return found
    return shortest(repr(found)) if isinstance(found, float) else json.dumps(found)


def _axis(text: str, base: Config) -> Axis:
    key, _, values = (part.strip() for part in text.partition("="))
    if not (key and is_range(values)):
        listed = [next(iter(arm.values.items())) for arm in grid([text])]
        axis = Axis(listed[0][0], tuple(value for _, value in listed))
        for value in axis.values:
            if (other := axis.read(value)) != value:
                raise UserError(f"--grid {text}: {other} and {value} are the same. Leave one of them out.")
        return axis
    written = values.split("..", 1)
    try:
        low, high = map(float, written)
    except ValueError:
        low = high = math.nan
    if not (math.isfinite(high - low) and low < high):
        raise UserError(f"--grid {text}: {values} is not LOW..HIGH with LOW < HIGH, as in 1e-6..1e-1.")
    whole = all(re.fullmatch(r"[+-]?\d+", end) for end in written)
    return Range(key, (), low, high, whole and _holds_whole(key, base))


def _holds_whole(key: str, base: Config) -> bool:
    """By the setting's type, as it may be null now; an option of a user's class has none but its value's."""
    if is_setting(key, Config):
        return is_whole(key, Config)
    now = _lookup(key, base)
    return isinstance(now, int) and not isinstance(now, bool)


def _meaning(written: str) -> object:
    """[0, 0.99] and [0.0,0.99] are one value, and so are True and true."""
    try:
        return from_yaml(f"[{written}]")
    except (yaml.YAMLError, OmegaConfBaseException):
        return written


def _lookup(key: str, base: Config) -> Any:
    """penalty.l2, of both players, is looked up for G."""
    found: Any = base
    for part in key.split("."):
        if part in ("l1", "l2", "on") and found is base.penalty:
            found = found.G
        found = found.get(part) if isinstance(found, dict) else getattr(found, part, None)
    return found
