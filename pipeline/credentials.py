"""URLs without credentials, and paths without their folders, for messages, files and charts."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any


def redacted(url: str) -> str:
    """A URL without user, password, tokens and signature; other texts unchanged."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return url
    host = re.split("[/?#]", rest, maxsplit=1)[0]
    if "@" not in host and "@" in rest and re.search(r"^[^[].*:(?!\d*$)", host):
        return redacted(f"{scheme}://{rest.rpartition('@')[2]}")  # what follows : is a password with a slash
    path = re.split("[?#]", rest, maxsplit=1)[0][len(host) :]
    return f"{scheme}://{host.rpartition('@')[2]}{path}"


def all_redacted(value: Any, by: Callable[[str], str] = redacted) -> Any:
    """As `by`, of every text in nested dicts and lists."""
    if isinstance(value, dict):
        return {key: all_redacted(entry, by) for key, entry in value.items()}
    if isinstance(value, list):
        return [all_redacted(entry, by) for entry in value]
    return by(value) if isinstance(value, str) else value


def scrubbed(text: str) -> str:
    """A message with every URL in it redacted.

    A URL ends at a quote or a bracket, unless an @ follows: a password may contain any character.
    """
    return re.sub(r"\w+://(?:(?:(?!://)\S)*@)?[^\s'\"<>]*", lambda url: redacted(url[0]), text)


def public(setting: str) -> str:
    """A setting for other people: URLs redacted; of a path outside the current folder, its last part."""
    path = re.fullmatch(r"([\w.]*:)?((?:/|~|\.\.).*)", setting, re.DOTALL)
    if path is None or ("://" in setting and path[1] != "file:"):
        return scrubbed(setting)
    return (path[1] or "") + PurePosixPath(path[2]).name


def reason(error: Exception, given: str) -> str:
    """Why `given` cannot be read; for a URL without quoting it, as that may be a password."""
    if "://" in given:
        return "write a URL in quotes, and $ in a password as %24."
    return " ".join(str(error).split())


def anonymous(text: str) -> str:
    """A text that may leave this machine: URLs without credentials, and no folders of this machine's.

    Of an absolute path only the last part stays: /home/me/runs/mine becomes …/mine.
    """
    text = scrubbed(text).replace("file:///", "/")
    return re.sub(r"(?<![\w/.<…])(?:~[\w.-]*)?/(?!/)(?:[^\s/'\",;:()\[\]<>]+/)*(?=[^\s/])", "…/", text)
