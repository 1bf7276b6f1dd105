"""events.jsonl: what happened to a run beside its charts: starts, stops, warnings, and errors that ended it.

Rows are in order of time. Each has `cur_nimg`, `time` (seconds since 1970), `event` (start, stop, warning or
error) and what belongs to it.
Rows are kept when a run falls back to an older checkpoint: that, too, has happened.
"""

from __future__ import annotations

import platform
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.run.rows import append

if TYPE_CHECKING:
    from pipeline.parallel.ranks import Ranks

EVENTS = "events.jsonl"
_PACKAGES = ("shardgan", "torch", "accelerate", "deepspeed", "webdataset")


def record(folder: Path, event: str, cur_nimg: int, **what: Any) -> None:
    """Add a row. A disk that does not take it is no reason to stop."""
    row = {"cur_nimg": cur_nimg, "time": round(time.time(), 3), "event": event, **what}
    with suppress(OSError):
        append(folder / EVENTS, row)


def environment(ranks: Ranks) -> dict[str, Any]:
    """What a run runs on and with; names no machine and no person."""
    import torch

    on_gpu = ranks.device.type == "cuda"
    device = torch.cuda.get_device_name(ranks.device) if on_gpu else f"{platform.machine()} CPU"
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):  # of a source folder that is not installed
            found[name] = version(name)
    if on_gpu and torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return {
        "strategy": ranks.strategy,
        "world": ranks.world,
        "device": device,
        "precision": ranks.precision,
        "compiled": ranks.compilation and str(ranks.compilation),
        "versions": found,
    }
