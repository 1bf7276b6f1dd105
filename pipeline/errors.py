"""Errors that are shown to the user."""

from __future__ import annotations


class UserError(ValueError):
    """What the user can fix: shown as one message without a traceback."""

    status = 2  # exit status


class CommonError(UserError):
    """A UserError that every rank raises: only the main rank shows it."""


class RunError(CommonError):
    """Ends a run that began well, whatever the user gave it."""

    status = 1
