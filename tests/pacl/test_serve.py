"""`pacl serve` over HTTP: what it answers, what it refuses, and that towers run once; the page in a real browser."""

import base64
import hashlib
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import zlib

import numpy as np
import pytest
import torch
from conftest import encode, picture
from pacl.cli import main
from pacl.data.scenes import CLASSES
from pacl.segment.draw import word_colours
from pacl.segment.options import ServeOptions
from pacl.segment.predict import Segmenter, similarity_map
from pacl.serve import server as http_server
from pacl.serve import viewer as viewing
from pacl.serve.run import demo_scenes, find_examples, make_viewer
from pacl.serve.server import MOST_BYTES, PAGE, Server
from pacl.sharing import load_pacl
from pacl.towers import load_towers
from PIL import Image

torch.set_num_threads(1)

PHOTO = encode(picture(0, 48, 64))
WORDS = ["a dog", "grass", "red ball"]


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """A folder of examples beside a file that is none."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "one.jpg").write_bytes(PHOTO)
    (folder / "secret.txt").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def viewer(untrained):
    return make_viewer(ServeOptions(checkpoint=str(untrained / "run/embedder"), max_image_pixels=8000, device="cpu"))


def started(server: Server) -> Server:
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    return server


@pytest.fixture(scope="module")
def server(examples, untrained, viewer):
    with started(Server(viewer, examples=find_examples(examples, str(untrained / "run/embedder")))) as server:
        yield server
        server.shutdown()


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


# Answers


def test_scores_are_those_of_similarity_map(server, untrained):
    status, answer = post(server, "/api/image", PHOTO)
    assert status == 200 and (answer["width"], answer["height"], answer["h"], answer["w"]) == (64, 48, 8, 11)
    towers, embedder = load_pacl(untrained / "run/embedder")
    image = Image.open(io.BytesIO(PHOTO))
    found = {}
    for model, own in (("PACL", [embedder]), ("CLIP", [])):
        status, words = post(server, "/api/words", {"image": answer["image"], "words": WORDS, "model": model})
        assert status == 200 and words["words"] == WORDS and (words["h"], words["w"]) == (8, 11)
        found[model] = torch.tensor(words["scores"]).unflatten(1, (8, 11))
        expected = similarity_map(image, WORDS, towers, *own)
        torch.testing.assert_close(found[model], expected, rtol=0, atol=6e-5)
        assert words["colours"] == word_colours(4)[1:].tolist()  # those of pacl look
    assert (found["PACL"] - found["CLIP"]).abs().max() > 0.01


def test_a_patch_and_those_like_it(server, viewer):
    key = post_image(server)
    status, answer = post(server, "/api/patch", {"image": key, "row": 3, "column": 10})
    assert status == 200
    found = np.array(answer["similarity"]).reshape(answer["h"], answer["w"])
    patches = viewer._kept[key].dense["PACL"].patches.numpy()
    assert np.abs(found - (patches * patches[3, 10]).sum(-1)).max() < 6e-5
    assert np.unravel_index(found.argmax(), found.shape) == (3, 10) and found.max() == pytest.approx(1, abs=1e-4)
    for request in ({"row": 8}, {"column": -1}, {"row": 1.5}, {"row": True}, {"row": "<b>" * 100}):
        status, answer = post(server, "/api/patch", {"image": key, "row": 0, "column": 0, **request})
        assert re.search(r"400 (row|column): got .*, expected 0 to", refused(status, answer))


def test_towers_run_once(server, viewer):
    """Per image and way of embedding; words and patches ask them nothing, words seen before nothing at all."""
    runs = {"image": 0, "text": 0}

    def count(name):
        return lambda *_: runs.update({name: runs[name] + 1})

    segmenter = viewer.segmenters["PACL"]
    hooks = [
        segmenter.embed.register_forward_hook(count("image")),
        segmenter.towers.text.register_forward_hook(count("text")),
    ]
    try:
        key = post_image(server, encode(picture(5, 40, 40)))
        assert runs == {"image": 1, "text": 0}
        first = post(server, "/api/words", {"image": key, "words": ["new word", "another"]})
        assert runs == {"image": 1, "text": 1}
        assert post(server, "/api/words", {"image": key, "words": ["new word", "another"]}) == first
        assert post_image(server, encode(picture(5, 40, 40))) == key
        post(server, "/api/patch", {"image": key, "row": 0, "column": 0})
        assert runs == {"image": 1, "text": 1}
        post(server, "/api/words", {"image": key, "words": ["another", "third"]})
        assert runs == {"image": 1, "text": 2}
    finally:
        for hook in hooks:
            hook.remove()


def test_few_images_and_words_are_kept(server, viewer, monkeypatch):
    monkeypatch.setattr(viewing, "IMAGES", 2)
    monkeypatch.setattr(viewing, "KEPT_WORDS", 2)
    keys = [post_image(server, encode(picture(seed, 16, 16))) for seed in (20, 21)]
    status, answer = post(server, "/api/words", {"image": keys[0], "words": ["a", "b", "c"]})  # 20 is the later one now
    assert status == 200 and len(viewer._texts) == 2
    keys.append(post_image(server, encode(picture(22, 16, 16))))
    assert set(viewer._kept) == {keys[0], keys[2]}
    status, answer = post(server, "/api/words", {"image": keys[1], "words": ["a"]})
    assert (
        refused(status, answer)
        == "404 image: got an unknown or expired key, expected that of a kept image; send it again"
    )


def test_threads_answer_as_one(server):
    key, found = post_image(server), []
    requests = [{"image": key, "words": [f"thing {i}", "grass"]} for i in range(6)]
    threads = [
        threading.Thread(target=lambda r=r: found.append((r["words"][0], post(server, "/api/words", r))))
        for r in requests
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6 and all(status == 200 for _, (status, _) in found)
    for word, (_, answer) in found:
        assert (word, answer) == (word, post(server, "/api/words", {"image": key, "words": [word, "grass"]})[1])


@pytest.mark.parametrize("threshold", [None, 0.02])
@pytest.mark.parametrize("model", ["PACL", "CLIP"])
def test_the_python_lines_make_the_view(server, tmp_path, monkeypatch, model, threshold):
    key = post_image(server)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photo.jpg").write_bytes(PHOTO)
    words = ['odd "word" \\ {0}', "grass\n"]
    request = {"image": key, "words": words, "model": model, "threshold": threshold}
    status, answer = post(server, "/api/words", request)
    names = {"path": "photo.jpg"}
    exec(answer["python"], names)
    torch.testing.assert_close(names["scores"].flatten(1), torch.tensor(answer["scores"]), rtol=0, atol=6e-5)
    assert (names["labels"].max() > 1) == (threshold is not None)
    colours = ([[0, 0, 0]] if threshold is not None else []) + answer["colours"]
    assert names["colours"].tolist() == colours
    assert Image.open("overlay.png").size == (64, 48)
    status, answer = post(server, "/api/patch", {"image": key, "row": 1, "column": 2, "model": model})
    exec(answer["python"], names)
    torch.testing.assert_close(names["similarity"].flatten(), torch.tensor(answer["similarity"]), rtol=0, atol=6e-5)
    assert Image.open("patch.png").size == (64, 48)


def test_markup_in_words_is_data(server):
    words = ["<script>alert(1)</script>", "\u202e", "\ud800", '"><img src=x onerror=alert(1)>']
    status, answer = post(server, "/api/words", {"image": post_image(server), "words": words})
    assert status == 200 and answer["words"] == words
    text = PAGE.read_text()
    for word in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "Function(", "http:", "https:"):
        assert word not in text, word


def test_the_page_and_its_policy(server):
    status, headers, data = call(server, "GET", f"/?token={server.token}", headers={})
    assert status == 200 and data == PAGE.read_bytes() and headers["Content-Type"] == "text/html; charset=utf-8"
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    script = re.search(r"<script>(.*)</script>", data.decode(), re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert headers["Referrer-Policy"] == "no-referrer" and headers["Cache-Control"] == "no-store"
    assert server.token not in data.decode()


def test_examples_are_by_number_alone(server):
    status, _, data = call(server, "GET", "/api/info")
    info = json.loads(data)
    assert (
        info["examples"] == [{"name": "one.jpg", "words": ""}]
        and info["models"] == ["PACL", "CLIP"]
        and info["scale"] == [0.0, 0.6]
    )
    assert call(server, "GET", "/api/example/0")[2] == PHOTO
    for path in ("1", "-1", "secret.txt", "../secret.txt", "%2e%2e%2fsecret.txt", "0/../../clip", "", "٠"):
        status, _, data = call(server, "GET", f"/api/example/{urllib.parse.quote(path, safe='/.%')}")
        assert refused(status, json.loads(data)) == "404 path: there is nothing here"


def test_the_demo_brings_scenes_of_its_own(untrained, viewer, tmp_path):
    assert find_examples(None, str(untrained / "run/embedder")) == [] == find_examples(None, None)
    for name in ("clip", "scenes", "embedder"):
        (tmp_path / name).mkdir()
    examples = find_examples(None, str(tmp_path / "embedder"))
    assert examples == demo_scenes() and len({x.image for x in examples}) == 6
    with started(Server(viewer, examples=examples)) as server:
        status, _, data = call(server, "GET", "/api/example/5")
        server.shutdown()
    scene = np.asarray(Image.open(io.BytesIO(data)))
    assert status == 200 and scene.shape == (64, 64, 3) and data == examples[5].image
    words = examples[5].words.split(", ")
    assert set(words) <= set(CLASSES) and 3 <= len(words) <= 5


# Refusals


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
    status, _, data = call(server, method, path, PHOTO if method == "POST" else None, headers)
    assert refused(status, json.loads(data)).startswith(f"403 {message}")


def test_the_page_itself_is_let_in(server):
    """Also through a forwarded port, where Host and Origin name the other end's."""
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
        with pytest.raises(OSError):  # a byte now and then is no way to hold on
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
    """A PNG of 30,000 x 30,000 pixels by its header, in a few bytes."""

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
        (b"no image", "image: got an unknown format, expected JPEG, PNG, WEBP"),
        (b"", "image: got an unknown format, expected JPEG, PNG, WEBP"),
        (gif(), "image: got an unknown format, expected JPEG, PNG, WEBP"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "image: got an unknown format, expected JPEG, PNG, WEBP"),
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


# The command


def test_plain_clip_alone(untrained):
    model = f"local-dir:{untrained / 'clip'}"
    viewer = make_viewer(ServeOptions(model=model, stride=2, templates="photo", device="cpu"))
    answer = viewer.words(viewer.add(PHOTO)["image"], ["grass"])
    assert (
        list(viewer.segmenters) == ["CLIP"]
        and "load_towers(" in answer["python"]
        and "templates('photo')" in answer["python"]
    )
    segmenter = Segmenter(load_towers(model), stride=2)
    texts = segmenter.texts(["grass"], ["a photo of a {}."])
    expected = segmenter.scores(Image.open(io.BytesIO(PHOTO)), texts)
    assert (answer["h"], answer["w"]) == tuple(expected.shape[1:]) and answer["margins"] == [2 / 64, 2 / 88]
    torch.testing.assert_close(torch.tensor(answer["scores"][0]), expected.flatten(), rtol=0, atol=6e-5)


def test_what_cannot_begin_is_one_line(untrained, server, capsys):
    checkpoint = ["--checkpoint", str(untrained / "run/embedder"), "--no-browser"]
    for flags, message in (
        ([*checkpoint, "--port", str(server.server_port)], "in use"),
        ([*checkpoint, "--port", "99999"], "port"),
        ([*checkpoint, "--stride", "3"], "stride: got 3"),
        ([*checkpoint, "--examples", str(untrained / "clip")], "images: got none in"),
        (["--model", "ViT-B-32"], "pretrained: got none for ViT-B-32"),
    ):
        assert main(["serve", *flags]) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_ctrl_c_while_a_connection_begins(viewer):
    """It ends that too, at once, though its client says nothing."""

    class Interrupted(Server):
        def process_request(self, request, client_address):
            super().process_request(request, client_address)
            time.sleep(0.2)  # its thread waits for the request by now
            signal.raise_signal(signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), Interrupted(viewer) as server:
        idle = socket.create_connection(("127.0.0.1", server.server_port))
        start = time.monotonic()
        server.serve_until_interrupted()
    assert time.monotonic() - start < http_server.Handler.timeout / 2
    assert signal.getsignal(signal.SIGINT) is handler
    idle.close()


def test_the_command_until_ctrl_c(examples, untrained):
    code = "import sys; from pacl.cli import main; sys.exit(main())"
    flags = ["--checkpoint", str(untrained / "run/embedder"), "--port", "0", "--device", "cpu", "--no-browser"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, "serve", *flags, "--examples", str(examples)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        address = urllib.parse.urlsplit(process.stdout.readline().strip())
        assert address.hostname == "127.0.0.1" and len(address.query) > 30
        connection = http.client.HTTPConnection("127.0.0.1", address.port, timeout=30)
        connection.request("GET", f"/api/info?{address.query}")
        assert json.loads(connection.getresponse().read())["examples"][0]["name"] == "one.jpg"
        idle = socket.create_connection(("127.0.0.1", address.port))  # as browsers keep some
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)  # the interpreter's end takes seconds on a busy machine
        assert (process.returncode, error) == (130, "")
        idle.close()
    finally:
        process.kill()
        process.wait()


# In a browser


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright and a Chromium")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with playwright.sync_playwright() as play:
        try:
            browser = play.chromium.launch(executable_path=path, args=["--no-sandbox"] if os.getuid() == 0 else [])
        except playwright.Error as error:
            pytest.skip(f"no Chromium: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


DROP = """([data, name]) => {
  const bytes = Uint8Array.from(atob(data), x => x.charCodeAt(0)), transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name, {type: "image/jpeg"}));
  document.getElementById("drop").dispatchEvent(new DragEvent("drop", {dataTransfer: transfer, bubbles: true}));
}"""


def wait(page, condition: str) -> None:
    """Playwright's own way is an eval in the page, which its policy forbids."""
    end = time.monotonic() + 20
    while not page.evaluate(f"() => Boolean({condition})"):
        assert time.monotonic() < end, condition
        time.sleep(0.02)


def pixels(canvas) -> np.ndarray:
    data = canvas.evaluate("x => x.toDataURL('image/png')").split(",")[1]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")).astype(int)


def test_drop_type_and_click_in_a_browser(server, viewer, browser):
    page = browser.new_page()
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(server.url)
    page.wait_for_selector("#views canvas")  # the example is there at once
    data = encode(picture(9, 60, 90))
    page.evaluate(DROP, [base64.b64encode(data).decode(), "<img src=x onerror=alert(1)>.jpg"])
    wait(page, "document.querySelector('#views canvas')?.height === 320")
    plain = pixels(page.locator("#views canvas"))
    # Words: a legend of them all as text, and at full opacity nothing but their colours, as the scores have it.
    page.locator("#opacity").fill("1")
    page.locator("#words").fill("a dog, <img src=x onerror=alert(1)>, grass")
    wait(page, "document.querySelectorAll('#legend li').length === 3")
    words = ["a dog", "<img src=x onerror=alert(1)>", "grass"]
    assert page.locator("#legend span").all_inner_texts() == words
    assert page.locator("img").count() == 0
    scores = viewer.words(hashlib.sha256(data).hexdigest(), words)
    shown = pixels(page.locator("#views canvas"))
    dense = viewer._kept[hashlib.sha256(data).hexdigest()].dense["PACL"]
    large = dense.__class__(dense.patches, shown.shape[:2], dense.margins)
    expected = np.array(scores["colours"])[large.labels(viewer._embedded(words)).labels.numpy()]
    assert (shown == expected).all(-1).mean() > 0.99 and (shown != plain).any()
    # One word's map, then plain CLIP beside PACL.
    page.locator("#legend button").nth(2).click()
    page.wait_for_selector("#legend button[aria-pressed=true]")
    assert (pixels(page.locator("#views canvas")) != shown).any()
    page.locator("#models input").nth(2).check()
    wait(page, "document.querySelectorAll('#views canvas').length === 2")
    assert page.locator("figcaption").all_inner_texts() == ["PACL", "CLIP"]
    # A click on a patch, its numbers on hover, and the keyboard.
    canvas = page.locator("#views canvas").first
    box = canvas.bounding_box()
    canvas.click(position={"x": box["width"] * 0.99, "y": box["height"] * 0.01})
    wait(page, "view.kind === 'patch' && patches.PACL")
    assert page.evaluate("[view.row, view.column]") == [0, scores["w"] - 1]
    hover = page.locator("#hover")
    canvas = page.locator("#views canvas").first
    canvas.hover(position={"x": box["width"] * 0.5, "y": box["height"] * 0.01})
    assert "grass: cosine" in hover.inner_text() and "similarity to the clicked patch" in hover.inner_text()
    page.locator("#best").focus()
    page.keyboard.press("ArrowDown")
    wait(page, "view.row === 1 && patches.PACL")
    # Downloads.
    for button, name in (("png", "pacl.png"), ("json", "pacl.json"), ("python", "pacl_view.py")):
        with page.expect_download() as download:
            page.locator(f"#{button}").click()
        assert download.value.suggested_filename == name
        saved = download.value.path().read_bytes()
        if name == "pacl.json":
            assert json.loads(saved)["words"]["CLIP"]["words"] == words
        elif name == "pacl.png":
            assert Image.open(io.BytesIO(saved)).width > 2 * 480
        else:
            compile(saved, name, "exec")
    # An image that the server let go of is sent again, unseen by the user.
    viewer._kept.clear()
    page.locator("#words").fill("a dog, sky")
    wait(page, "document.querySelectorAll('#legend li').length === 2")
    assert page.locator("#said").inner_text() == ""
    # A bad image is a sentence, and the view stays.
    page.evaluate(DROP, [base64.b64encode(b"no image").decode(), "x.jpg"])
    wait(page, "document.getElementById('said').textContent.includes('expected JPEG')")
    assert page.locator("#views canvas").count() == 2
    assert not [x for x in said if "404" not in x and "400" not in x], said
    assert all(x.startswith((f"http://127.0.0.1:{server.server_port}/", "blob:", "data:")) for x in asked)
    page.close()
