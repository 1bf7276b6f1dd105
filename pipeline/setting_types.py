"""What the value of a setting may be: types that check themselves."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter, ValidationError

NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Kimg = Annotated[float, Field(ge=1e-3, le=1e12, allow_inf_nan=False)]  # an image or more; an int64 of them
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Signal = Literal["USR1", "USR2", "HUP", "CONT"]
Norm = Literal["batch", "sync_batch", "group", "instance", "none"]
# auto: effective for a player that has a layer with a weight_gain, else weights (gan/penalised.py)
PenaltyOn = Literal["auto", "weights", "all", "effective"]

_LONGEST_NAME = 255  # bytes, of a file's name

Schedulable = float | tuple[float, float]  # a constant, or [from, to] along the cosine of run.burn_in_kimg


def _each_end(bounds: Any) -> BeforeValidator:
    """Of a `Schedulable` whose number, or both of whose ends, are within `bounds`."""
    number = TypeAdapter(bounds)

    def checked(value: Any) -> Schedulable:
        pair = isinstance(value, list | tuple)
        try:
            ends = [number.validate_python(end) for end in (value if pair else [value])]
        except ValidationError as error:
            problem = error.errors()[0]
            if problem["type"] in ("float_type", "float_parsing"):
                raise ValueError("must be a number or [from, to]") from None
            raise ValueError(problem["msg"] + " at both ends" * pair) from None
        if pair and len(ends) != 2:
            raise ValueError("must be a number or [from, to]")
        return (ends[0], ends[1]) if pair else ends[0]

    return BeforeValidator(checked)


ScheduledNonNegative = Annotated[Schedulable, _each_end(NonNegative)]
ScheduledPositive = Annotated[Schedulable, _each_end(Positive)]
ScheduledBelowOne = Annotated[Schedulable, _each_end(BelowOne)]
ScheduledShare = Annotated[Schedulable, _each_end(Annotated[float, Field(ge=0, le=1)])]


def _one_in(value: Any) -> float:
    """1/k, given as a number or as the text `1/k`."""
    numerator, slash, denominator = str(value).partition("/")
    try:
        share = float(numerator) / float(denominator) if slash else float(value)
    except (TypeError, ValueError, ZeroDivisionError):
        share = 0.0
    k = round(1 / share) if 1e-9 < share <= 1 else 0
    if not k or not math.isclose(k * share, 1, rel_tol=1e-6):
        raise ValueError("must be 1, 1/2, 1/3 or another 1/k")
    return 1 / k


OneIn = Annotated[float, BeforeValidator(_one_in)]


def none_or_several(count: int) -> int:
    if count == 1:
        raise ValueError("must be 0, for none, or at least 2")
    return count


def plain_name(name: str | None) -> str | None:
    if name is not None and (not name.strip() or name.startswith(".") or Path(name).name != name):
        raise ValueError("must be a plain folder name, without '/' and not starting with '.'")
    try:
        size = len(os.fsencode(name or ""))
    except UnicodeEncodeError:
        size = 0
    if size > _LONGEST_NAME:
        raise ValueError(f"must be shorter: file names have at most {_LONGEST_NAME} bytes")
    if name is not None and not (size and name.isprintable()):
        raise ValueError(
            "has characters that cannot be printed, or are not in this shell's locale (C.UTF-8 has all)"
        )
    return name


def _place(text: str) -> str:
    """A local path with `~` and `$VARIABLE` expanded, as config.yaml will show it; a URL unchanged."""
    if "://" in text:
        plain = text if "@" in text else text.replace(" ", "-")  # S3 keys may contain blanks, logins may not
        if not re.fullmatch(r"\w+://((?!://)[^\s\x00-\x1f])+", plain):
            raise ValueError("is neither a path nor one URL")
        return text
    if secret := re.search(r"\$\{?(\w*(KEY|TOKEN|SECRET|PASSW)\w*)", text):
        raise ValueError(f"the variable {secret[1]} seems to be a secret, which no path may hold")
    path = os.path.expandvars(text)
    try:
        path.encode()
    except UnicodeEncodeError:
        raise ValueError("is not text in UTF-8, which config.yaml is. Rename the folder") from None
    if unset := re.search(r"\$(\w+|\{[^}]*\})", path):
        raise ValueError(f"the variable {unset[0]} is not set")
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError:
        raise ValueError("there is no such home folder; write the path out") from None


Place = Annotated[str, AfterValidator(_place)]
