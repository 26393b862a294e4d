"""Requests to a `pacl serve` server, and the checks that all its answers share."""

import http.client
import json
import threading

from pacl.serve.server import Server
from pictures import encode, picture

PHOTO = encode(picture(0, 48, 64))


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
