"""A server on loopback that answers as the Hugging Face Hub does where `hf://` asks it, for one dataset."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import json
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

REPOSITORY = "me/data"


@dataclass
class Hub:
    """The server. files: bytes by path. fault: called before a file is read; returns a status that fails it, or None.

    requests: method and path of each request so far.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    fault: Callable[[str], int | None] = lambda path: None

    def entry(self, path: str) -> dict[str, object]:
        data = self.files[path]
        oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        return {"type": "file", "path": path, "size": len(data), "oid": oid}


@contextlib.contextmanager
def hub_server() -> Iterator[tuple[Hub, str]]:
    """Run the server; give it and its address, for HF_ENDPOINT."""
    hub = Hub()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def _handler(hub: Hub) -> type[http.server.BaseHTTPRequestHandler]:
    api, files = f"/api/datasets/{REPOSITORY}", f"/datasets/{REPOSITORY}/resolve/main/"

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *words: object) -> None:
            pass

        def reply(self, status: int, answer: object, **headers: str) -> None:
            data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def do_GET(self) -> None:
            hub.requests.append((self.command, self.path))
            path = urllib.parse.unquote(self.path.partition("?")[0])
            if path.startswith(files):
                self.file(path.removeprefix(files))
            elif path in (api, f"{api}/revision/main"):
                self.reply(200, {"id": REPOSITORY, "sha": "1" * 40, "siblings": [], "tags": [], "private": False})
            elif path.startswith(f"{api}/tree/main"):
                self.tree(path.removeprefix(f"{api}/tree/main").strip("/"))
            else:
                self.reply(404, {"error": "no such page"}, X_Error_Code="RepoNotFound")

        do_HEAD = do_GET

        def tree(self, folder: str) -> None:
            inside = [path for path in hub.files if path.startswith(f"{folder}/" if folder else "")]
            if folder and not inside:
                self.reply(404, {"error": "no such folder"}, X_Error_Code="EntryNotFound")
                return
            below = [path for path in inside if "/" not in path[len(folder) :].strip("/")]
            self.reply(200, [hub.entry(path) for path in below])

        def file(self, path: str) -> None:
            if status := hub.fault(path):
                self.reply(status, {"error": "fails on demand"})
                return
            if path not in hub.files:
                self.reply(404, {"error": "no such file"}, X_Error_Code="EntryNotFound")
                return
            data = hub.files[path]
            first, _, last = self.headers.get("Range", f"bytes=0-{len(data) - 1}").removeprefix("bytes=").partition("-")
            self.reply(206, data[int(first) : int(last) + 1])

        def do_POST(self) -> None:
            hub.requests.append((self.command, self.path))
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            action = self.path.removeprefix(api).partition("?")[0]
            if action == "/paths-info/main":
                asked = urllib.parse.parse_qs(body.decode())["paths"]
                self.reply(200, [hub.entry(path) for path in asked if path in hub.files])
            elif action == "/preupload/main":
                modes = {"uploadMode": "regular", "shouldIgnore": False}
                self.reply(200, {"files": [{"path": each["path"], **modes} for each in json.loads(body)["files"]]})
            elif action == "/commit/main":
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                self.reply(200, {"commitUrl": f"/datasets/{REPOSITORY}/commit/1", "commitOid": "1" * 40})
            else:
                self.reply(404, {"error": "no such page"})

    return Handler
