"""`data.train` as a URL → a remote folder, and the shards in it if they are named one by one."""

from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass, field
from urllib.parse import quote, unquote

from pipeline.config import UserError
from pipeline.credentials import redacted
from pipeline.data.locate import expand_braces
from pipeline.data.record import INDEX, is_name

SCHEMES = ("http", "https", "s3", "gs")


@dataclass(frozen=True)
class RemoteFolder:
    """A folder of shards at a URL. Its `str` may be shown: credentials are not in it."""

    scheme: str
    path: str  # host or bucket, and the folder in it; ends in a slash
    login: str = field(default="", repr=False)  # `user:password@` of an http URL
    query: str = field(default="", repr=False)  # `?…` of an http URL: tokens and signatures, on every file

    def __str__(self) -> str:
        return f"{self.scheme}://{self.path}"

    def show(self, name: str) -> str:
        """The URL of a file in the folder, for messages."""
        return f"{self}{name}"

    def url(self, name: str) -> str:
        """The URL of a file in the folder, credentials included: for transfers, never for messages."""
        if self.scheme not in ("http", "https"):
            return f"{self}{name}"
        path = quote(self.path, safe="/%:[]@!$&'()*+,;=~")  # as given, where it is a URL's already
        return f"{self.scheme}://{self.login}{path}{quote(name)}{self.query}"

    def name(self, listed: str) -> str | None:
        """The name of a file in the folder by its name in a listing; None if it is no plain name of one.

        A server may list whatever it likes, and the name becomes one of a file on this machine.
        """
        http = self.scheme in ("http", "https")
        # Links of a page come appended to the URL of the page, keys of a bucket without a scheme.
        starts = (self.url("").rstrip("/") + "/", self.url("").rpartition("?")[0]) if http else (self.path,)
        start = next((start for start in starts if start and listed.startswith(start)), None)
        if start is None:
            return None
        name = unquote(listed[len(start) :].partition("?")[0]) if http else listed[len(start) :]
        return name if is_name(name) and not re.search(r"[/\\]", name) else None


def is_url(train: str) -> bool:
    return "://" in train


def locate_url(train: str) -> tuple[RemoteFolder, tuple[str, ...] | None]:
    """The folder, and the names of the shards relative to it (None: all there are). Raises UserError."""
    scheme, _, rest = train.partition("://")
    if scheme == "file":
        raise UserError(
            f"{redacted(train)}: a folder on this machine is named by its path alone, without file://."
        )
    if scheme not in SCHEMES:
        raise UserError(
            f"{redacted(train)} is not on this machine, and not at an http(s)://, s3:// or gs:// URL; copy "
            "the shards into a local folder."
        )
    rest, login, query = _split(scheme, rest, redacted(train))
    paths = expand_braces(rest.removesuffix(f"/{INDEX}"))
    if not paths[0].endswith(".tar"):
        if len(paths) > 1:
            raise UserError(f"{redacted(train)}: a brace list names shards (*.tar) of one folder.")
        return RemoteFolder(scheme, paths[0].rstrip("/") + "/", login, query), None
    folder = posixpath.commonpath([posixpath.dirname(path) for path in paths]) if len(paths) > 1 else ""
    folder = folder or posixpath.dirname(paths[0])
    if "/" not in rest or any(
        not path.startswith(f"{folder}/") or not path.endswith(".tar") for path in paths
    ):
        raise UserError(f"{redacted(train)}: a brace list names shards (*.tar) of one folder.")
    names = {path[len(folder) + 1 :] for path in paths}
    if scheme in ("http", "https"):
        names = {unquote(name) for name in names}
    if not all(map(is_name, names)):
        raise UserError(f"{redacted(train)}: the name of a shard leads out of its folder or cannot be shown.")
    return RemoteFolder(scheme, f"{folder}/", login, query), tuple(sorted(names))


def _split(scheme: str, rest: str, shown: str) -> tuple[str, str, str]:
    """Host and path, login, query."""
    login = query = ""
    if scheme in ("http", "https"):
        rest, mark, query = rest.partition("#")[0].partition("?")
        query = mark + query
        host, slash, path = rest.partition("/")
        login, at, host = host.rpartition("@")
        login, rest = login + at, host + slash + path
        if not re.fullmatch(r"([^:\[\]@]+|\[[^\]]+\])(:\d+)?", host):
            raise UserError(
                f"{shown} is no URL to fetch from: write / ? # @ : in a password as %2F %3F %23 %40 %3A."
            )
    if re.search(r"[*?\[\]#]", rest.partition("/")[2]) or not rest or rest.startswith("/"):
        raise UserError(
            f"{shown}: give the URL of a folder, of one shard, or a brace list ({{000000..000099}}.tar)."
        )
    return rest, login, query
