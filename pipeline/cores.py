"""How many CPU cores this process may use."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress

from pipeline import cgroups

BINDING = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY")
"""By these, torch binds the process that imports it to one core, and all that it starts later too."""


def cores() -> int:
    """Those that the process is bound to, or as few as a container's quota allows (`docker run --cpus`, a
    Kubernetes limit): threads beyond it would make each other wait."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([bound, *_quotas()])


def bound_by(environ: Mapping[str, str], every: int | None = os.cpu_count()) -> str | None:
    """What to say if a variable has bound this process to one core of `every`; our own commands remove it."""
    found = [name for name in BINDING if name in environ]
    if not found or not every or every == 1 or cores() > 1:
        return None
    return (
        f"{found[0]} has bound this process, and others of this machine, to one core of {every}: "
        f"`unset {' '.join(found)}` before `accelerate launch`"
    )


def _quotas() -> Iterator[int]:
    """The cores that each control group of this process allows."""
    for folder, is_v1 in cgroups.folders("cpu"):
        with suppress(OSError, ValueError, ZeroDivisionError):
            if is_v1:
                names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
                quota, period = (int((folder / name).read_text()) for name in names)
            else:
                quota, period = map(int, (folder / "cpu.max").read_text().split())  # or "max 100000"
            if quota > 0:  # -1: none
                yield max(1, math.ceil(quota / period))
