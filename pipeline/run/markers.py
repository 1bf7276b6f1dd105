"""Files in a run folder that say how far it got. Each holds a cur_nimg."""

from __future__ import annotations

from pathlib import Path

from pipeline.durable import write

SAVED, STOPPED, DONE = "SAVED", "STOPPED", "DONE"  # its first checkpoint; how it ended


def mark(folder: Path, name: str, cur_nimg: int) -> None:
    """Raises OSError."""
    write(folder / name, f"{cur_nimg}\n")


def marked(folder: Path, name: str) -> float:
    """cur_nimg in a marker; 0 if there is none."""
    try:
        return float((folder / name).read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0.0
