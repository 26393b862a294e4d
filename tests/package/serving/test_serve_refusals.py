"""`pacl serve` refuses bad requests, images and words over HTTP, each in one sentence."""

import io
import json
import re
import socket
import time
import zlib

import pytest
import torch
from pacl.serve import server as http_server
from pacl.serve.server import MOST_BYTES
from pictures import encode, picture
from PIL import Image
from serving import PHOTO, call, post, post_image, refused

torch.set_num_threads(1)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"X-Token": "wrong"}, "token: expected"),
        ({"X-Token": None}, "token: expected"),
        ({"X-Token": "\xe9"}, "token: expected"),
        ({"Host": "evil.example"}, "Host: got 'evil.example', expected"),
        ({"Host": "127.0.0.1.evil.example:80"}, "Host: got '127.0.0.1.evil.example:80', expected"),
        ({"Host": ""}, "Host: got '', expected"),
        ({"Origin": "http://evil.example"}, "Origin: expected"),
        ({"Origin": "null"}, "Origin: expected"),
        ({"Origin": "http://127.0.0.1:1"}, "Origin: expected"),
    ],
)
@pytest.mark.parametrize("method, path", [("GET", "/"), ("GET", "/api/info"), ("POST", "/api/image"), ("GET", "/none")])
def test_what_is_not_the_page_is_refused(server, method, path, change, message):
    headers = {"X-Token": server.token, "Host": f"127.0.0.1:{server.server_port}"} | change
    headers = {name: value for name, value in headers.items() if value is not None}
    status, answered, data = call(server, method, path, PHOTO if method == "POST" else None, headers)
    if (method, path) == ("GET", "/"):  # a person reads this in a browser
        assert status == 403 and message in data.decode() and answered["Content-Type"].startswith("text/plain")
        assert data.startswith(b"Open the whole address that pacl serve printed, with ?token=")
    else:
        assert refused(status, json.loads(data)).startswith(f"403 {message}")


def test_the_page_itself_is_let_in(server):
    """The page is also let in through a forwarded port, where Host and Origin name the port at the other end."""
    for host in (f"127.0.0.1:{server.server_port}", "localhost:9000"):
        headers = {"X-Token": server.token, "Host": host, "Origin": f"http://{host}"}
        assert call(server, "GET", "/api/info", headers=headers)[0] == 200
    assert server.server_address[0] == "127.0.0.1"


def test_unknown_paths_and_methods(server):
    for method, path, code in (
        ("GET", "/none", 404),
        ("GET", "/api/words", 404),
        ("POST", "/", 404),
        ("GET", "/../page.html", 404),
        ("GET", "/api/info/../../../etc/passwd", 404),
        ("PUT", "/api/image", 501),
        ("DELETE", "/", 501),
    ):
        status, _, data = call(server, method, path, b"" if method != "GET" else None)
        assert refused(status, json.loads(data)) and status == code


def test_a_large_body_is_refused_before_it_is_read(server):
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=5) as connection:
        head = f"POST /api/image HTTP/1.1\r\nHost: localhost\r\nX-Token: {server.token}\r\n"
        connection.sendall(f"{head}Content-Length: {MOST_BYTES + 1}\r\n\r\n".encode())
        answer = connection.makefile("rb").read()
    assert b" 413 " in answer.splitlines()[0] and b"expected at most 20,971,520" in answer
    for length in ("-1", "x", "1e3", ""):
        with socket.create_connection(("127.0.0.1", server.server_port), timeout=5) as connection:
            connection.sendall(f"{head}Content-Length: {length}\r\n\r\n".encode())
            assert b" 411 " in connection.makefile("rb").read().splitlines()[0]


def test_slow_and_broken_off_bodies(server, monkeypatch):
    monkeypatch.setattr(http_server, "SECONDS", 0.5)
    head = f"POST /api/image HTTP/1.1\r\nHost: localhost\r\nX-Token: {server.token}\r\nContent-Length: 99999\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=5) as connection:
        connection.sendall(head.encode())
        with pytest.raises(OSError):  # slow bytes do not keep a connection open
            for _ in range(100):
                connection.sendall(b"x")
                time.sleep(0.05)
    monkeypatch.setattr(http_server.Handler, "timeout", 0.2)
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=5) as connection:
        connection.sendall(head.encode() + b"abc")
        assert b" 408 " in connection.makefile("rb").read().splitlines()[0]
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=5) as connection:
        connection.sendall(head.encode() + b"abc")
        connection.shutdown(socket.SHUT_WR)
        assert b"ended 99,996 bytes early" in connection.makefile("rb").read()
    assert call(server, "GET", "/api/info")[0] == 200


def bomb() -> bytes:
    """Return a PNG of a few bytes whose header promises 30,000 x 30,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    head = (30000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def gif() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "GIF")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data, message",
    [
        (bomb(), "900000000|30000 x 30000 pixels, more than 8,000|exceeds limit"),
        (encode(picture(0, 100, 100), "PNG"), "100 x 100 pixels, more than 8,000"),
        (b"no image", "image: got a file of an unknown or damaged format, expected JPEG, PNG, WEBP"),
        (b"", "image: got a file of an unknown or damaged format, expected JPEG, PNG, WEBP"),
        (gif(), "image: got GIF, which is not read, expected JPEG, PNG, WEBP"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "image: got PostScript, which is not read, expected JPEG, PNG, WEBP"),
        (encode(picture(2, 40, 40), "PNG")[:700], "image: "),
    ],
)
def test_what_is_no_image(server, viewer, data, message):
    kept = set(viewer._kept)
    answer = refused(*post(server, "/api/image", data))
    assert answer.startswith("400 image: ") and re.search(message, answer)
    assert set(viewer._kept) == kept


@pytest.mark.parametrize(
    "change, message",
    [
        ({"words": "dog"}, "words: got str, expected a list of strings"),
        ({"words": [1]}, "words: got [1], expected a list of strings"),
        ({"words": []}, "words: got 0, expected 1 to 64"),
        ({"words": ["  "]}, "words: got 1, expected 1 to 64, each of 1 to 200 letters"),
        ({"words": ["x"] * 65}, "words: got 65"),
        ({"words": ["x" * 201]}, "words: got 1"),
        ({"words": [","]}, "classes: got"),
        ({"model": "other"}, "model: got 'other', expected PACL or CLIP"),
        ({"model": ["PACL"]}, "model: got"),
        ({"threshold": "0; import os"}, "threshold: got str, expected a number"),
        ({"path": "/etc/passwd"}, "body: got an unexpected keyword argument 'path'"),
        ({"self": 1}, "body: "),
    ],
)
def test_bad_requests_are_one_sentence(server, change, message):
    request = {"image": post_image(server), "words": ["dog"]} | change
    assert refused(*post(server, "/api/words", request)).startswith(f"400 {message}")


def test_bodies_that_are_no_request(server):
    for body, message in (
        (b"", "body: got invalid JSON, expected a JSON object"),
        (b"{", "body: got invalid JSON, expected a JSON object"),
        (b"\xff", "body: got invalid JSON, expected a JSON object"),
        (b"[" * 100_000, "body: got invalid JSON, expected a JSON object"),
        (b"[]", "body: got a JSON list, expected an object"),
        (b"{}", "body: missing a required argument: 'image'"),
    ):
        assert refused(*post(server, "/api/words", body)) == f"400 {message}"
    for image in ("../../etc/passwd", "0" * 64, 3, None, [1]):
        assert refused(*post(server, "/api/words", {"image": image, "words": ["a"]})).startswith("404 image: got an")
