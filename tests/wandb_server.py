"""A W&B server for the real client, which can die, stall, fail and come back on demand.

What it keeps is what a person would see on the run's page. It understands what the client needs for a run
(GraphQL for the run and its pictures, the file stream for charts and summary) and refuses everything else.
"""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WELL, FAILING, SILENT = "well", "failing", "silent"  # answers; says 500; accepts and never answers


class GoneError(Exception):
    """Of a run that was deleted."""


@dataclass
class ServedRun:
    """One run as its page shows it."""

    name: str = ""
    project: str = ""
    group: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)  # rows, pictures as W&B's dictionaries
    summary: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    alerts: list[tuple[str, str]] = field(default_factory=list)  # title, text
    exit_code: int | None = None  # None: running, as far as the server knows

    @property
    def steps(self) -> list[int]:
        return [row["_step"] for row in self.history]


class WandbServer:
    """Listens on its own port, the same one after it comes back."""

    def __init__(self) -> None:
        self.runs: dict[str, ServedRun] = {}
        self.deleted: set[str] = set()  # ids that are never given again
        self.mood = WELL
        self.received: list[bytes] = []  # bodies of all requests
        self._changed = threading.Condition()
        self._http: _Listener | None = None
        self._port = 0
        self.come_back()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def run(self) -> ServedRun:
        """The one run there is."""
        (run,) = self.runs.values()
        return run

    def come_back(self) -> None:
        self._http = _Listener(self, self._port)
        self._port = self._http.server_port
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def die(self) -> None:
        """Stop listening, and drop all connections."""
        assert self._http is not None
        self._http.end()
        self._http = None

    def close(self) -> None:
        if self._http is not None:
            self.die()

    def delete(self, run_id: str) -> None:
        """As somebody does in the browser."""
        with self._changed:
            del self.runs[run_id]
            self.deleted.add(run_id)

    def until(self, happened: Callable[[], bool], seconds: float = 120) -> None:
        """Wait until a request makes `happened` true."""
        with self._changed:
            assert self._changed.wait_for(happened, seconds), f"not within {seconds:g} s"

    def answer(self, path: str, body: bytes) -> Any:
        """Record a request; returns the answer."""
        with self._changed:
            self.received.append(body)
            try:
                if self.mood == FAILING:
                    raise LookupError(path)
                if path == "/graphql":
                    return {"data": self._graphql(json.loads(body))}
                if found := re.fullmatch(r"/files/[^/]*/[^/]*/([^/]*)/file_stream", path):
                    return self._file_stream(self.runs[found[1]], json.loads(body))
                if found := re.fullmatch(r"/upload/([^/]*)/(.*)", path):
                    self.runs[found[1]].files[found[2]] = body
                    return {}
                if path == "/":
                    return {}
                raise LookupError(path)
            finally:
                self._changed.notify_all()

    def _graphql(self, request: dict[str, Any]) -> dict[str, Any]:
        asked = re.search(r"(?:query|mutation) (\w+)", request["query"])
        assert asked is not None
        given = request.get("variables") or {}
        match asked[1]:
            case "ServerFeaturesQuery":
                return {"serverInfo": {"features": []}}
            case "Viewer":
                return {"viewer": {"id": "u", "entity": "me", "username": "me", "teams": {"edges": []}}}
            case "RunResumeStatus":
                run = self.runs.get(given["name"])
                bucket = None if run is None else _resume_status(given["name"], run)
                return {"model": {"id": "p", "name": "p", "entity": _ENTITY, "bucket": bucket}}
            case "UpsertBucket":
                return {"upsertBucket": self._upsert(given)}
            case "CreateRunFiles":
                files = [
                    {"name": f, "uploadUrl": f"{self.url}/upload/{given['run']}/{f}"} for f in given["files"]
                ]
                return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}
            case "NotifyScriptableRunAlert":
                self.runs[given["runName"]].alerts.append((given["title"], given["text"]))
                return {"notifyScriptableRunAlert": {"success": True}}
        raise LookupError(asked[1])

    def _upsert(self, given: dict[str, Any]) -> dict[str, Any]:
        name, inserted = given["name"], given["name"] not in self.runs
        if name in self.deleted:
            raise GoneError(f"run me/p/{name} was previously created and deleted; try a new run name")
        run = self.runs.setdefault(name, ServedRun())
        run.name, run.project = given.get("displayName") or run.name, given.get("project") or run.project
        run.group, run.tags = given.get("groupName") or run.group, given.get("tags") or run.tags
        if config := given.get("config"):
            run.config = json.loads(config)
        project = {"id": "p", "name": run.project, "entity": _ENTITY}
        bucket = {"id": name, "name": name, "displayName": run.name, "description": "", "sweepName": None}
        bucket |= {"config": json.dumps(run.config), "project": project, "historyLineCount": len(run.history)}
        return {"bucket": bucket, "inserted": inserted}

    @staticmethod
    def _file_stream(run: ServedRun, sent: dict[str, Any]) -> dict[str, Any]:
        for name, chunk in (sent.get("files") or {}).items():
            lines = [json.loads(line) for line in chunk["content"]]
            if name == "wandb-history.jsonl":
                assert chunk["offset"] <= len(run.history), "a gap"
                run.history[chunk["offset"] : chunk["offset"] + len(lines)] = lines
            elif name == "wandb-summary.json":
                run.summary = lines[-1]
        if sent.get("complete"):
            run.exit_code = sent.get("exitcode")
        return {}


_ENTITY = {"id": "e", "name": "me"}


def _resume_status(name: str, run: ServedRun) -> dict[str, Any]:
    return {
        "id": name,
        "name": name,
        "displayName": run.name,
        "summaryMetrics": json.dumps(run.summary),
        "logLineCount": 0,
        "historyLineCount": len(run.history),
        "eventsLineCount": 0,
        "historyTail": json.dumps([json.dumps(row) for row in run.history[-1:]]),
        "eventsTail": "[]",
        "config": json.dumps(run.config),
        "tags": run.tags,
        "notes": None,
        "wandbConfig": json.dumps({"t": 1}),
    }


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, owner: WandbServer, port: int) -> None:
        self.owner = owner
        self.ended = threading.Event()
        self._connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def end(self) -> None:
        self.ended.set()
        self.shutdown()
        self.server_close()
        for connection in self._connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Silent: mostly clients that went away."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Listener

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        owner = self.server.owner
        if owner.mood == SILENT:
            self.server.ended.wait()
            self.close_connection = True
            return
        try:
            status, answer = 200, owner.answer(self.path, body)
        except GoneError as error:
            status, answer = 409, {"errors": [{"message": str(error), "path": ["upsertBucket"]}]}
        except LookupError as error:
            status, answer = (500 if owner.mood == FAILING else 404), {"error": str(error)}
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_PUT = do_POST

    def log_message(self, *_: object) -> None: ...


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    server = WandbServer()
    try:
        yield server
    finally:
        server.close()
