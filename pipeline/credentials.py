"""URLs without credentials, and paths without their folders, for messages, files and charts."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

_USER = re.compile(  # a URL's user and password, which may contain any character; host:8080/a@b has none
    r"""(?<=://)(?:[^\s/?#:)>"\[\]]*:(?!\d*(?:[/?#)>"\]\s]|$))(?:(?!://)\S)*@|[^\s/?#:)>"\[\]]*@)"""
)
_SECRET = re.compile(  # names of what a query may hold; not keyword, author, design
    r"token|secret|passw|pwd|credential|signature|^x-(?:amz|goog)-|^googleaccessid$|key(?:[-_]?(?:pair[-_]?)?id)?$"
    r"|(?:^|[-_.])(?:sig|pass|jwt|hmac|auth(?:orization)?)$",
    re.IGNORECASE,
)


def redacted(url: str) -> str:
    """A URL, or several in a text, without user, password, tokens and signature; other texts unchanged."""
    return _redacted(scrubbed(url))


def _redacted(url: str) -> str:
    """As `redacted`, of a text that begins with a URL: what follows it counts as part of it."""
    shown = ""
    while "://" in url:
        scheme, _, rest = url.partition("://")
        host = re.split("[/?#]", rest, maxsplit=1)[0]
        if "@" not in host and "@" in rest and re.search(r"^[^[].*:(?!\d*$)", host):
            url = f"{scheme}://{rest.rpartition('@')[2]}"  # what follows : is a password with a slash
            continue
        path = re.split("[?#]", rest, maxsplit=1)[0][len(host) :]
        shown, url = f"{shown}{scheme}://", f"{host.rpartition('@')[2]}{path}"  # which may hold another one
    return shown + url


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
    return re.sub(r"\w+://(?:(?:(?!://)\S)*@)?[^\s'\"<>]*", lambda url: _redacted(url[0]), text)


def shareable(text: str) -> str:
    """A text for other people, such as a model card: of its URLs only what lets someone in is removed.

    A link keeps the rest of its query, and its fragment. A URL ends where Markdown or HTML may end it.
    """
    return re.sub(r"\w+://[^\s)>\"\]]*", lambda url: _without_secrets(url[0]), _USER.sub("", text))


def _without_secrets(url: str) -> str:
    """A URL without the parts of its query or fragment that look secret; a text's own mark after it stays."""
    shown, *rest = re.split("([?#]|&(?:amp;)?)", url)
    mark, after = "", ""
    for separator, part in zip(rest[::2], rest[1::2], strict=True):
        mark = mark if mark and separator[0] == "&" else separator  # ? of a part that was removed
        name, given, value = part.partition("=")
        if given and _SECRET.search(unquote(name)):
            end = re.search("[<'`].*$|[.,:;!*]+$", value)
            after = end[0] if end else ""
        else:
            shown, mark, after = shown + mark + part, "", ""
    return shown + after


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
    text = str(error).partition("\n    full_key: ")[0]  # OmegaConf's; the key is in the message already
    if missing := re.search("Missing mandatory value: (.+)", text):
        return f"??? stands for a value yet to be given ({missing[1]}). Give one, or leave the key out."
    unknown = re.fullmatch("Interpolation key '(.+)' not found", text)
    return f"${{{unknown[1]}}} is none of the settings given." if unknown else " ".join(text.split())


def anonymous(text: str) -> str:
    """A text that may leave this machine: URLs without credentials, and no folders of this machine's.

    Of an absolute path only the last part stays: /home/me/runs/mine becomes …/mine. Its folders' names may
    hold blanks if the path stands in quotes, or begins with the current folder or the user's home.
    """
    text = scrubbed(text).replace("file:///", "/")
    text = re.sub(r"""(?<=(['"]))(?:~[\w.-]*)?/(?:[^/'"\n]+/)*(?=[^/'"\n]+\1)""", "…/", text)
    places = [os.environ.get("HOME", "")]
    with suppress(OSError):
        places.append(str(Path.cwd()))
    for folder in places:
        if " " in folder:
            text = text.replace(f"{folder}/", "/…/")
    return re.sub(r"(?<![\w/.<…])(?:~[\w.-]*)?/(?!/)(?:[^\s/'\",;:()\[\]<>]+/)*(?=[^\s/])", "…/", text)
