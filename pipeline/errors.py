"""Errors that are shown to the user."""

from __future__ import annotations


class UserError(ValueError):
    """What the user can fix: shown as one message without a traceback, exit status 2."""


class CommonError(UserError):
    """A UserError that every rank raises: only the main rank shows it."""

    status = 2


class RunError(CommonError):
    """Ends a run that began well, whatever the user gave it: exit status 1."""

    status = 1
