"""A real S3 server on loopback, moto's, behind a proxy that fails on demand."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import logging
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import boto3
from moto.server import ThreadedMotoServer
from pacl.stores import _filesystem

BUCKET = "bucket"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "AKIDFORTESTS", "AWS_SECRET_ACCESS_KEY": "secret-for-tests"}


@dataclass
class S3:
    """The server. client: boto3's, which does not pass through the proxy. requests: method and path of each so far.

    fault: called with the method, the path and the range of each request of the proxy; returns what to do: None to
    pass it on, "reset", "cut" (half of the body, then the end of the connection), "short" (half of the body as if it
    were all), a status such as "503", or the seconds before the first byte. latency: seconds before every answer.
    most_together: the largest number of requests that were open at once. signed: paths of the requests so far at
    addresses with a signature. trusting: False to refuse these.
    """

    client: object
    endpoint: str
    requests: list[tuple[str, str]] = field(default_factory=list)
    fault: Callable[[str, str, str], str | float | None] = lambda method, path, part: None
    latency: float = 0.0
    together: int = 0
    most_together: int = 0
    signed: list[str] = field(default_factory=list)
    trusting: bool = True

    def begin(self) -> None:
        """Forget the requests of an earlier test, and let none fail."""
        self.requests.clear()
        self.signed.clear()
        self.fault, self.latency, self.most_together, self.trusting = S3.fault, 0.0, 0, True

    def put(self, path: Path, key: str) -> str:
        self.client.put_object(Bucket=BUCKET, Key=key, Body=path.read_bytes())
        return f"s3://{BUCKET}/{key}"

    def put_folder(self, folder: Path, prefix: str) -> str:
        for path in folder.iterdir():
            self.put(path, f"{prefix}/{path.name}")
        return f"s3://{BUCKET}/{prefix}"

    def get(self, key: str) -> bytes:
        return self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read()

    def keys(self, prefix: str) -> list[str]:
        found = self.client.list_objects_v2(Bucket=BUCKET, Prefix=prefix)
        return [each["Key"] for each in found.get("Contents", [])]


class Faults:
    """Let each of some requests fail a number of times. Made for S3.fault."""

    def __init__(self, kind: str | float, times: int, method: str = "GET", suffix: str = ".tar"):
        self.kind, self.left, self.method, self.suffix = kind, times, method, suffix
        self.lock = threading.Lock()

    def __call__(self, method: str, path: str, part: str) -> str | float | None:
        with self.lock:
            if method != self.method or not path.endswith(self.suffix) or self.left <= 0:
                return None
            self.left -= 1
            return self.kind


@contextlib.contextmanager
def s3_server(monkeypatch) -> Iterator[S3]:
    """Run the server and its proxy, with the environment that s3fs reads."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
    client.create_bucket(Bucket=BUCKET)
    store = S3(client, "")
    proxy = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(store, host, port))
    proxy.daemon_threads = True
    threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True).start()
    store.endpoint = f"http://127.0.0.1:{proxy.server_port}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.endpoint)
    _filesystem.cache_clear()  # it may know the server of other tests
    try:
        yield store
    finally:
        proxy.shutdown()
        proxy.server_close()
        server.stop()


def _handler(store: S3, host: str, port: int) -> type[http.server.BaseHTTPRequestHandler]:
    lock = threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *words: object) -> None:
            pass

        def answer(self) -> None:
            with lock:
                store.together += 1
                store.most_together = max(store.most_together, store.together)
            try:
                self.respond()
            finally:
                with lock:
                    store.together -= 1

        def respond(self) -> None:
            path, signature, _ = self.path.partition("?X-Amz-")
            store.requests.append((self.command, path))
            if signature:
                store.signed.append(path)
                if not store.trusting:
                    self.reply(403, {}, b"")
                    return
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            fault = store.fault(self.command, path, self.headers.get("Range", ""))
            time.sleep(store.latency)
            if isinstance(fault, float):
                time.sleep(fault)
            elif fault == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                self.close_connection = True
                return
            elif fault is not None and fault.isdigit():
                self.reply(int(fault), {}, b"<Error><Code>SlowDown</Code></Error>" if fault == "503" else b"")
                return
            upstream = http.client.HTTPConnection(host, port)
            upstream.request(self.command, self.path, body, dict(self.headers))
            found = upstream.getresponse()
            data = found.read()
            upstream.close()
            if fault == "short":
                data = data[: len(data) // 2]
            self.reply(found.status, dict(found.headers), data, cut=fault == "cut")

        def reply(self, status: int, headers: dict[str, str], data: bytes, cut: bool = False) -> None:
            left_out = ("connection", "transfer-encoding", "server", "date")
            self.send_response(status)
            size = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(data))
            for name, value in headers.items():
                if name.lower() not in (*left_out, "content-length"):
                    self.send_header(name, value)
            self.send_header("Content-Length", size)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data[: len(data) // 2] if cut else data)
            self.close_connection = cut

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

    return Handler
