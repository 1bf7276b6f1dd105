"""A server that answers huggingface_hub as the Hugging Face Hub does, as far as models go."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Repository:
    private: bool
    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{".gitattributes": b""}])
    messages: list[str] = field(default_factory=list)

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1]

    def sha(self, revision: str = "main") -> str | None:
        """A commit is called by its number, in 40 digits."""
        newest = f"{len(self.commits) - 1:040d}"
        known = {"main": newest, **{f"{n:040d}": f"{n:040d}" for n in range(len(self.commits))}}
        return known.get(revision)


class Hub(ThreadingHTTPServer):
    def __init__(self, token: str) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.token, self.url = token, f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.asked: list[str] = []  # every request's method and path


@contextmanager
def running(token: str) -> Iterator[Hub]:
    with Hub(token) as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()


class _Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {self.server.token}":
            self._error(401, "")
        elif path == "/api/repos/create":
            given = json.loads(body)
            name = f"{given['organization']}/{given['name']}"
            self.server.repositories[name] = Repository(_is_private(given))
            self._send({"url": f"{self.server.url}/{name}"})
        elif path == "/api/validate-yaml":
            self._send({"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/(.*))?", path):
            self._of_model(found[1], found[2] or "", body)
        elif found := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/(\w+)/(.+)", path):
            self._file(found[1], found[2], found[3])
        else:
            self._error(404, "")

    def _of_model(self, name: str, rest: str, body: bytes) -> None:
        repository = self.server.repositories.get(name)
        if repository is None:
            self._error(404, "RepoNotFound")
            return
        what, _, revision = rest.partition("/")
        sha = repository.sha(revision or "main")
        if sha is None:
            self._error(404, "RevisionNotFound")
        elif what in ("", "revision"):
            siblings = [{"rfilename": file} for file in repository.commits[int(sha)]]
            self._send({"id": name, "sha": sha, "private": repository.private, "siblings": siblings})
        elif what == "tree":
            files = repository.commits[int(sha)].items()
            self._send([{"type": "file", "path": f, "size": len(c), "oid": _oid(c)} for f, c in files])
        elif what == "preupload":
            files = json.loads(body)["files"]
            ways = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
            self._send({"files": ways})
        elif what == "commit":
            self._commit(name, repository, [json.loads(line) for line in body.splitlines()])

    def _commit(self, name: str, repository: Repository, lines: list[dict[str, Any]]) -> None:
        files = dict(repository.files)
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                if value.get("parentCommit") not in (None, repository.sha()):
                    self._error(412, "")
                    return
                repository.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                assert line["key"] == "deletedFile"
                del files[value["path"]]
        repository.commits.append(files)
        url = f"{self.server.url}/{name}/commit/{repository.sha()}"
        self._send({"success": True, "commitOid": repository.sha(), "commitUrl": url, "hookOutput": ""})

    def _file(self, name: str, revision: str, file: str) -> None:
        repository = self.server.repositories[name]
        sha = repository.sha(revision)
        assert sha is not None
        content = repository.commits[int(sha)][file]
        self._send(content, {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": sha})

    def _send(self, content: object, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(200)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        for key, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _error(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.send_header("X-Error-Code", code)
        self.end_headers()


def _is_private(given: dict[str, Any]) -> bool:
    """Clients say it in one word or the other."""
    return bool(given["private"]) if "private" in given else given["visibility"] == "private"


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
