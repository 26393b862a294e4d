"""The page over HTTP, for this machine's browser alone: bound to 127.0.0.1, with a token, and nothing read unasked."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import inspect
import json
import re
import secrets
import signal
import socket
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

from ..segment.draw import MAGMA, SCALE
from .viewer import Gone, Viewer

PAGE = Path(__file__).with_name("page.html")
MOST_BYTES = 20 * 2**20  # of a request's body
SECONDS = 20  # for a whole body; silence of 10 ends a connection
HOSTS = ("127.0.0.1", "localhost")  # a name that someone made point here is none of them


class Refused(Exception):
    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Example(NamedTuple):
    """An image that the page offers: a file of the user's choice or its bytes, and words to begin with."""

    name: str
    image: Path | bytes
    words: str = ""


class Server(ThreadingHTTPServer):
    """Serves `viewer` on 127.0.0.1 at `url`. port 0: any free one."""

    daemon_threads = False  # one cut off by the interpreter's end may abort the process
    interrupted = False

    def __init__(self, viewer: Viewer, port: int = 0, examples: Sequence[Example] = ()):
        self.viewer, self.examples = viewer, list(examples)
        self.token = secrets.token_urlsafe(24)
        self.page = PAGE.read_bytes()
        self.connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/?token={self.token}"

    def serve_until_interrupted(self) -> None:
        """Answer until Ctrl-C (SIGINT), then raise KeyboardInterrupt; in the main thread only.

        Python's own handler would raise it anywhere: while a connection's thread starts, socketserver forgets the
        connection without ending it, and its thread waits for the client.
        """
        before = signal.signal(signal.SIGINT, lambda *_: setattr(self, "interrupted", True))
        try:
            self.serve_forever()
        finally:
            signal.signal(signal.SIGINT, before)

    def service_actions(self) -> None:
        """What `serve_forever` calls between requests, and twice a second."""
        if self.interrupted:
            raise KeyboardInterrupt

    def server_close(self) -> None:
        """End what is still connected, and wait for it; a browser holds connections that it does not use."""
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        super().server_close()

    def process_request(self, request, client_address) -> None:
        """Remember the connection before its thread begins: the server may end before that."""
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request, client_address) -> None:
        """Connections that break off are no one's concern; what goes wrong in an answer is in it."""


class Handler(BaseHTTPRequestHandler):
    timeout = 10

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def _get(self, path: str) -> tuple[str, bytes]:
        if path == "/":
            return "text/html; charset=utf-8", self.server.page
        if path == "/api/info":
            viewer = self.server.viewer
            examples = [{"name": x.name, "words": x.words} for x in self.server.examples]
            info = {"models": list(viewer.segmenters), "scale": SCALE, "magma": MAGMA.tolist()}
            return _json(info | {"most_bytes": MOST_BYTES, "examples": examples})
        number = re.fullmatch(r"/api/example/(\d{1,6})", path)
        if number and int(number[1]) < len(self.server.examples):
            image = self.server.examples[int(number[1])].image
            return "application/octet-stream", image if isinstance(image, bytes) else image.read_bytes()
        raise Refused(404, "path: there is nothing here")

    def _post(self, path: str) -> tuple[str, bytes]:
        viewer = self.server.viewer
        if path == "/api/image":
            return _json(viewer.add(self._body()))
        method = {"/api/words": viewer.words, "/api/patch": viewer.patch}.get(path)
        if method is None:
            raise Refused(404, "path: there is nothing here")
        try:
            request = json.loads(self._body())
        except (ValueError, RecursionError) as error:
            raise Refused(400, "body: not JSON") from error
        if not isinstance(request, dict):
            raise Refused(400, "body: expected a JSON object")
        try:
            inspect.signature(method).bind(**request)
        except TypeError as error:
            raise Refused(400, f"body: {error}") from error
        return _json(method(**request))

    def _answer(self, method) -> None:
        try:
            self._allow()
            status, (kind, data) = 200, method(urlsplit(self.path).path)
        except Refused as error:
            status, (kind, data) = error.status, _error(error)
        except Gone as error:
            status, (kind, data) = 404, _error(error.args[0])
        except ValueError as error:
            status, (kind, data) = 400, _error(error)
        except Exception as error:  # memory, a device
            status, (kind, data) = 500, _error(f"{type(error).__name__}: {error}")
        self._send(status, kind, data)

    def _allow(self) -> None:
        """Refuse another site's script, a name that was made to point here, and who does not know the token."""
        host = self.headers.get("Host", "")
        if re.sub(r":\d+$", "", host) not in HOSTS:
            raise Refused(403, f"Host: expected {' or '.join(HOSTS)}")
        if self.headers.get("Origin", f"http://{host}") != f"http://{host}":
            raise Refused(403, "Origin: expected this page's own")
        given = self.headers.get("X-Token") or parse_qs(urlsplit(self.path).query).get("token", [""])[0]
        if not secrets.compare_digest(given.encode(), self.server.token.encode()):
            raise Refused(403, "token: expected the one in the address that pacl serve printed")

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"\d{1,18}", length):
            raise Refused(411, "Content-Length: expected a number")
        if int(length) > MOST_BYTES:
            raise Refused(413, f"body: got {int(length):,} bytes, expected at most {MOST_BYTES:,}")
        parts, left, end = [], int(length), time.monotonic() + SECONDS
        while left:
            try:
                part = self.rfile.read1(min(left, 2**16))
            except TimeoutError:
                part = None
            if part is None or time.monotonic() > end:
                raise Refused(408, "body: too slow")
            if not part:
                raise Refused(400, f"body: ended {left:,} bytes early")
            parts.append(part)
            left -= len(part)
        return b"".join(parts)

    def _send(self, status: int, kind: str, data: bytes) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(data)),
            "Content-Security-Policy": POLICY,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",  # the address has the token
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cache-Control": "no-store",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the standard library refuses itself, said as everything else is."""
        self._send(code, *_error(message or self.responses.get(code, ("error",))[0]))

    def version_string(self) -> str:
        return "pacl"

    def log_message(self, *args) -> None:
        """Nothing: addresses have the token."""


def _json(value: Any) -> tuple[str, bytes]:
    return "application/json", json.dumps(value, allow_nan=False).encode()


def _error(message: Any) -> tuple[str, bytes]:
    return _json({"error": " ".join(str(message).split())[:300]})


def _policy(page: bytes) -> str:
    """Nothing from elsewhere, and of scripts and styles only the page's own two."""
    sources = []
    for name in ("script", "style"):
        inside = re.search(rf"<{name}>(.*?)</{name}>".encode(), page, re.DOTALL)[1]
        sources.append(f"{name}-src 'sha256-{base64.b64encode(hashlib.sha256(inside).digest()).decode()}'")
    rest = "img-src blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return f"default-src 'none'; {'; '.join(sources)}; {rest}"


POLICY = _policy(PAGE.read_bytes())
