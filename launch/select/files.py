"""Files that a selection leaves, each of which is there whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline import durable
from pipeline.config import UserError


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """As durable.whole, but raises UserError if the file cannot be written."""
    try:
        with durable.whole(path) as partial:
            yield partial
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}. Free some space or set permissions, and "
            "repeat the command: finished trials are kept."
        ) from None


def write(path: Path, text: str) -> None:
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")
