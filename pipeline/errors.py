"""Errors that are shown to the user."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """What the user can fix: shown as one message without a traceback."""

    status = 2  # exit status


class CommonError(UserError):
    """A UserError that every rank raises: only the main rank shows it."""


class RunError(CommonError):
    """Ends a run that began well, whatever the user gave it."""

    status = 1


class StoppedError(CommonError):
    """A signal came before there was anything to save."""

    status = 0


@contextmanager
def readable(what: str) -> Iterator[None]:
    """Raises UserError, instead of OSError, for what the system does not let us look at. what: a path."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or what} cannot be read: {error.strerror or error}.") from None


def expanded(path: str | Path) -> Path:
    """With `~` and `~name` as home folders. Raises UserError for someone who is unknown here."""
    found = os.path.expanduser(path)  # noqa: PTH111, which would read ./~name as ~name
    if found.startswith("~") and not os.path.exists(found):  # noqa: PTH110, which may raise
        raise UserError(f"{path}: there is no such home folder; write the path out.")
    return Path(found)
