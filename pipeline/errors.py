"""The error that people are shown."""

from __future__ import annotations


class UserError(ValueError):
    """What the user can mend: shown as one message without a traceback, exit status 2."""
