"""Serve the page over HTTP to this machine's browser alone: on 127.0.0.1, with a token, reading only given files."""

from __future__ import annotations

import contextlib
import errno
import inspect
import json
import re
import secrets
import select
import signal
import socket
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from ..formats import one_line
from ..segment.draw import MAGMA, SCALE
from .examples import Example, Thumbnails
from .gate import Unwanted
from .page import PAGE, POLICY
from .viewer import Gone, Viewer

MOST_BYTES = 20 * 2**20  # largest body of a request
SECONDS = 20  # longest time for a whole body; 10 silent seconds end a connection
ENDING = 0.3  # seconds that the server, when it closes, waits for running requests
HOSTS = ("127.0.0.1", "localhost")  # excludes foreign names that resolve to this machine (DNS rebinding)


class Refused(Exception):
    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Server(ThreadingHTTPServer):
    """HTTP server on 127.0.0.1 at `url`.

    viewer: answers requests; None if it is set before `serve_forever`, so that the port is taken before a model is
    loaded. port: 0 for any free one. Raises ValueError for a port that cannot be taken.
    """

    daemon_threads = False  # a daemon thread cut off by the interpreter's exit may abort the process
    block_on_close = False  # server_close waits by itself, and not for long
    interrupted = False
    viewer: Viewer

    def __init__(self, viewer: Viewer | None = None, port: int = 0, examples: Sequence[Example] = ()):
        if viewer is not None:
            self.viewer = viewer
        self.examples = list(examples)
        self.thumbnails = Thumbnails(self.examples)
        self.token = secrets.token_urlsafe(24)
        self.connections: set[socket.socket] = set()
        if not 0 <= port < 2**16:
            raise ValueError(f"--port: got {port}, expected 0 to {2**16 - 1}")
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except OSError as error:
            used = error.errno == errno.EADDRINUSE
            reason = "which another program uses" if used else f"which cannot be opened ({error.strerror})"
            raise ValueError(f"--port: got {port}, {reason}, expected a free port; 0 takes any") from error

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/?token={self.token}"

    def serve_until_interrupted(self) -> None:
        """Answer until Ctrl-C (SIGINT), then raise KeyboardInterrupt; for the main thread only.

        Python's own handler could raise it while a connection's thread starts. socketserver would then forget the
        connection without closing it, and its thread would wait for the client.
        """
        before = signal.signal(signal.SIGINT, lambda *_: setattr(self, "interrupted", True))
        try:
            self.serve_forever(poll_interval=0.1)
        finally:
            signal.signal(signal.SIGINT, before)

    def service_actions(self) -> None:
        """Raise KeyboardInterrupt after Ctrl-C; `serve_forever` calls this between requests and at each poll."""
        if self.interrupted:
            raise KeyboardInterrupt

    def server_close(self) -> None:
        """Close open connections, because browsers keep unused ones open, and drop all requests that wait for a turn.

        A request inside a model cannot be stopped; its thread is left to end after ENDING seconds.
        """
        super().server_close()
        self.thumbnails.gate.close()
        if hasattr(self, "viewer"):
            self.viewer.close()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        end = time.monotonic() + ENDING
        while self.connections and time.monotonic() < end:
            time.sleep(0.01)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Register the connection before its thread starts, because the server may close first."""
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore broken connections; errors of a request are in its answer."""


class Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = 10

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def _get(self, path: str) -> tuple[str, bytes]:
        if path == "/":
            return "text/html; charset=utf-8", PAGE
        if path == "/api/info":
            viewer = self.server.viewer
            examples = [{"name": x.name, "words": x.words} for x in self.server.examples]
            info = {"name": viewer.name, "models": list(viewer.segmenters), "scale": SCALE, "magma": MAGMA.tolist()}
            return _json(info | {"most_bytes": MOST_BYTES, "examples": examples})
        found = re.fullmatch(r"/api/(example|thumbnail)/(\d{1,6})", path)
        if found and int(found[2]) < len(self.server.examples):
            if found[1] == "thumbnail":
                return "image/jpeg", self.server.thumbnails.make(int(found[2]), self.server.viewer.max_image_pixels)
            return "application/octet-stream", self.server.examples[int(found[2])].read()
        raise Refused(404, "path: there is nothing here")

    def _post(self, path: str) -> tuple[str, bytes]:
        viewer = self.server.viewer
        if path == "/api/image":
            return _json(viewer.add(self._body(), self._wanted))
        methods: dict[str, Callable[..., Any]] = {
            "/api/words": viewer.words,
            "/api/patch": viewer.patch,
            "/api/picture": viewer.picture,
        }
        method = methods.get(path)
        if method is None:
            raise Refused(404, "path: there is nothing here")
        try:
            request = json.loads(self._body())
        except (ValueError, RecursionError) as error:
            raise Refused(400, "body: got invalid JSON, expected a JSON object") from error
        if not isinstance(request, dict):
            raise Refused(400, f"body: got a JSON {type(request).__name__}, expected an object")
        try:
            inspect.signature(method).bind(**request)
        except TypeError as error:
            raise Refused(400, f"body: {error}") from error
        answer = method(**request)
        return ("image/jpeg", answer) if isinstance(answer, bytes) else _json(answer)

    def _answer(self, method: Callable[[str], tuple[str, bytes]]) -> None:
        try:
            self._allow()
            status, (kind, data) = 200, method(urlsplit(self.path).path)
        except Refused as error:
            bare = self.command == "GET" and urlsplit(self.path).path == "/"  # in a browser's address bar
            status, (kind, data) = error.status, _sentence(error) if bare else _error(error)
        except Unwanted as error:
            status, (kind, data) = 503, _error(error)
        except Gone as error:
            status, (kind, data) = 404, _error(error.args[0])
        except ValueError as error:
            status, (kind, data) = 400, _error(error)
        except Exception as error:  # such as out of memory or a device's error
            status, (kind, data) = 500, _error(f"{type(error).__name__}: {error}")
        self._send(status, kind, data)

    def _allow(self) -> None:
        """Refuse scripts of other sites, foreign names that resolve to this machine, and requests without the token."""
        host = self.headers.get("Host", "")
        if re.sub(r":\d+$", "", host) not in HOSTS:
            raise Refused(403, f"Host: got {host[:80]!r}, expected {' or '.join(HOSTS)}")
        if self.headers.get("Origin", f"http://{host}") != f"http://{host}":
            raise Refused(403, "Origin: expected this page")
        given = self.headers.get("X-Token") or parse_qs(urlsplit(self.path).query).get("token", [""])[0]
        if not secrets.compare_digest(given.encode(), self.server.token.encode()):
            raise Refused(403, "token: expected the token in the address that pacl serve printed")

    def _wanted(self) -> bool:
        """Return False if the client has left: the page drops its request when another image is opened."""
        try:
            left = select.select([self.connection], [], [], 0)[0] and not self.connection.recv(1, socket.MSG_PEEK)
        except (OSError, ValueError):  # a closed connection
            return False
        return not left

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"\d{1,18}", length):
            raise Refused(411, f"Content-Length: got {length[:20]!r}, expected a number")
        if int(length) > MOST_BYTES:
            raise Refused(413, f"body: got {int(length):,} bytes, expected at most {MOST_BYTES:,}")
        parts, left, end = [], int(length), time.monotonic() + SECONDS
        while left:
            try:
                part = self.rfile.read1(min(left, 2**16))
            except TimeoutError:
                part = None
            if part is None or time.monotonic() > end:
                raise Refused(408, f"body: got it too slowly, expected all of it within {SECONDS} seconds")
            if not part:
                raise Refused(400, f"body: ended {left:,} bytes early, expected {length} bytes")
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
            "Referrer-Policy": "no-referrer",  # the address contains the token
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cache-Control": "no-store",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Send errors of the standard library's own checks in the same form as all others."""
        self._send(code, *_error(message or self.responses.get(code, ("error",))[0]))

    def version_string(self) -> str:
        return "pacl"

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing, because addresses contain the token."""


def _json(value: Any) -> tuple[str, bytes]:
    return "application/json", json.dumps(value, allow_nan=False).encode()


def _error(message: Any) -> tuple[str, bytes]:
    return _json({"error": one_line(message)[:300]})


def _sentence(message: Any) -> tuple[str, bytes]:
    text = (
        f"Open the whole address that pacl serve printed, with ?token= and all after it.\n({one_line(message)[:300]})\n"
    )
    return "text/plain; charset=utf-8", text.encode(errors="replace")
