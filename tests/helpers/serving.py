"""Requests to a `pacl serve` server, the checks that all its answers share, and what a browser shows."""

import base64
import http.client
import io
import json
import threading
import time

import numpy as np
from pacl.serve.server import Server
from pacl.serve.viewer import Viewer
from pictures import encode, picture
from PIL import Image

PHOTO = encode(picture(0, 48, 64))


def another(viewer: Viewer) -> Viewer:
    """Return a viewer with the same models for another server, which closes it at its end."""
    return Viewer(viewer.segmenters, viewer.load, max_image_pixels=viewer.max_image_pixels)


def started(server: Server) -> Server:
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    return server


def call(server, method: str, path: str, body=None, headers=None) -> tuple[int, dict, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    try:
        connection.request(method, path, body, {"X-Token": server.token} if headers is None else headers)
        response = connection.getresponse()
        return response.status, dict(response.headers), response.read()
    finally:
        connection.close()


def post(server, path: str, value) -> tuple[int, dict]:
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    status, headers, data = call(server, "POST", path, body)
    assert headers["Content-Type"] == "application/json"
    return status, json.loads(data)


def post_image(server, data: bytes = PHOTO) -> str:
    status, answer = post(server, "/api/image", data)
    assert status == 200, answer
    return answer["image"]


def refused(status: int, answer: dict) -> str:
    assert set(answer) == {"error"} and "\n" not in answer["error"] and 0 < len(answer["error"]) <= 300
    return f"{status} {answer['error']}"


DROP = """([data, name]) => {
  const bytes = Uint8Array.from(atob(data), x => x.charCodeAt(0)), transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name, {type: "image/jpeg"}));
  document.getElementById("drop").dispatchEvent(new DragEvent("drop", {dataTransfer: transfer, bubbles: true}));
}"""
SETTLED = "bitmap && !document.body.classList.contains('stale')"


def wait(page, condition: str = SETTLED) -> None:
    """Wait for a condition. Playwright's own wait_for_function needs an eval, which the page's policy forbids."""
    end = time.monotonic() + 20
    while not page.evaluate(f"() => Boolean({condition})"):
        assert time.monotonic() < end, condition
        time.sleep(0.02)


def drop(page, data: bytes, name: str) -> None:
    page.evaluate(DROP, [base64.b64encode(data).decode(), name])


def pixels(canvas) -> np.ndarray:
    data = canvas.evaluate("x => x.toDataURL('image/png')").split(",")[1]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")).astype(int)
