"""A real HTTP server on this machine that serves a folder, and hurts whoever it is told to hurt."""

from __future__ import annotations

import base64
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

ALWAYS = 10**9
MOVED = "sig=a%2Fb%2ac%7E%27"  # the query of where a file is that has "moved"


class FaultyServer(ThreadingHTTPServer):
    """`hurt("x.tar", "stall")` lets the next request for x.tar meet that fault; `times` of them."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.asked: Counter[str] = Counter()  # requests by path, hurt or not
        self.paths: list[str] = []  # of all requests, with their queries, as they came
        self.faults: defaultdict[str, list[str]] = defaultdict(list)
        self.always: dict[str, str] = {}
        self.login: str | None = None  # user:password that must be given
        self.query: str | None = None  # … and the query string
        self.ended = threading.Event()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def hurt(self, name: str, *faults: str, always: bool = False) -> None:
        if always:
            self.always[name] = faults[0]
        else:
            self.faults[name] += faults

    def fault(self, name: str) -> str:
        with self.lock:
            self.asked[name] += 1
            return self.faults[name].pop(0) if self.faults[name] else self.always.get(name, "")

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are what this is about."""


class _Handler(BaseHTTPRequestHandler):
    server: FaultyServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.server.paths.append(self.path)
        name = unquote(url.path).lstrip("/")
        fault = self.server.fault(name)
        if not self._let_in(url.query):
            self._answer(403, b"")
            return
        if fault.isdigit():
            self._answer(int(fault), b"")
            return
        if fault == "moved":
            self._answer(302, b"", moved=f"{url.path}?{MOVED}")
            return
        path = self.server.folder / name
        if path.is_dir():
            names = [quote(entry.name) + "/" * entry.is_dir() for entry in path.iterdir()]
            names += ["../", "/elsewhere/x.tar", "http://example.org/y.tar", "deeper/z.tar"]
            links = "".join(f'<a href="{name}">{name}</a>' for name in names)
            self._answer(200, links.encode(), "text/html")
        elif not path.is_file():
            self._answer(404, b"")
        else:
            self._serve(path.read_bytes(), fault)

    def _serve(self, data: bytes, fault: str) -> None:
        half = len(data) // 2
        if fault == "silent":
            self.server.ended.wait()
        elif fault == "stall":
            self._answer(200, data[:half], length=len(data))
            self.server.ended.wait()
        elif fault == "cut":
            self._answer(200, data[:half], length=len(data))
        elif fault == "says less":
            self._answer(200, data, length=half)
        elif fault == "says more":
            self._answer(200, data + bytes(512), length=len(data) + 512)
        elif fault == "ends early":  # as HTTP/1.0 without a Content-Length does, without a word
            self._answer(200, data[:half], length=None)
        elif fault == "endless":
            self._answer(200, data, length=None)
            while not self.server.ended.is_set():
                self.wfile.write(bytes(1 << 16))
        elif fault == "flipped":
            self._answer(200, data[:half] + bytes([data[half] ^ 1]) + data[half + 1 :])
        else:
            self._answer(200, data)
        self.close_connection = bool(fault) or self.close_connection

    def _let_in(self, query: str) -> bool:
        given = self.headers.get("Authorization", "").removeprefix("Basic ")
        login = base64.b64decode(given).decode() if given else None
        return (self.server.login, self.server.query) == (
            login if self.server.login else None,
            query if self.server.query else None,
        )

    def _answer(
        self,
        status: int,
        body: bytes,
        kind: str = "application/x-tar",
        length: int | None = -1,
        moved: str | None = None,
    ) -> None:
        self.send_response(status)
        if moved:
            self.send_header("Location", moved)
        self.send_header("Content-Type", kind)
        if length is None:
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(len(body) if length < 0 else length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None: ...


@contextmanager
def serving(folder: Path) -> Iterator[FaultyServer]:
    server = FaultyServer(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.ended.set()
        server.shutdown()
        server.server_close()
