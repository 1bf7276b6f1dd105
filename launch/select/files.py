"""Files that a selection leaves, each of which is there whole or not at all."""

from __future__ import annotations

from pathlib import Path

from pipeline import durable
from pipeline.config import UserError


def write(path: Path, content: str | bytes) -> None:
    """As durable.write, but raises UserError if the file cannot be written."""
    try:
        durable.write(path, content)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}. Free some space or set permissions, and "
            "repeat the command: finished trials are kept."
        ) from None
