"""The command `pacl serve`: it serves plain CLIP, refuses bad options, and ends with Ctrl-C."""

import http.client
import io
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.parse

import pytest
import torch
from pacl.cli import main
from pacl.segment.options import ServeOptions
from pacl.segment.predict import Segmenter
from pacl.serve import server as http_server
from pacl.serve.run import make_viewer
from pacl.serve.server import Server
from pacl.towers import load_towers
from pictures import encode, picture
from PIL import Image
from serving import PHOTO, another

torch.set_num_threads(1)


def test_plain_clip_alone(untrained):
    model = f"local-dir:{untrained / 'clip'}"
    viewer = make_viewer(ServeOptions(model=model, stride=2, templates="photo", device="cpu"))
    answer = viewer.words(viewer.add(PHOTO)["image"], ["grass"])
    assert (
        list(viewer.segmenters) == ["CLIP"]
        and f"load_towers({model!r}, None, tokens='naclip')" in answer["python"]
        and "templates('photo')" in answer["python"]
    )
    segmenter = Segmenter(load_towers(model, tokens="naclip"), stride=2)
    texts = segmenter.texts(["grass"], ["a photo of a {}."])
    expected = segmenter.scores(Image.open(io.BytesIO(PHOTO)), texts)
    assert (answer["h"], answer["w"]) == tuple(expected.shape[1:]) and answer["margins"] == [2 / 64, 2 / 88]
    torch.testing.assert_close(torch.tensor(answer["scores"][0]), expected.flatten(), rtol=0, atol=6e-5)


def test_what_cannot_begin_is_one_line(untrained, server, capsys):
    checkpoint = ["--checkpoint", str(untrained / "run/embedder"), "--no-browser", "--port", "0"]
    for flags, message in (
        (["--model", "none", "--port", str(server.server_port)], f"--port: got {server.server_port}, which another"),
        (["--model", "none", "--port", "99999"], "--port: got 99999, expected 0 to 65535"),
        ([*checkpoint, "--stride", "3"], "stride: got 3"),
        ([*checkpoint, "--examples", str(untrained / "clip")], "images: got none in"),
        (["--model", "ViT-B-32", "--port", "0"], "pretrained: got none for ViT-B-32"),
    ):
        assert main(["serve", *flags]) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_ctrl_c_while_a_connection_begins(viewer):
    """Ctrl-C ends the server at once, even while a connection waits for a silent client."""

    class Interrupted(Server):
        def process_request(self, request, client_address):
            super().process_request(request, client_address)
            time.sleep(0.2)  # long enough for its thread to wait for the request
            signal.raise_signal(signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), Interrupted(another(viewer)) as server:
        idle = socket.create_connection(("127.0.0.1", server.server_port))
        start = time.monotonic()
        server.serve_until_interrupted()
    assert time.monotonic() - start < http_server.Handler.timeout / 2
    assert signal.getsignal(signal.SIGINT) is handler
    idle.close()


def test_the_command_until_ctrl_c(examples, untrained):
    code = "import sys; from pacl.cli import main; sys.exit(main())"
    flags = ["--checkpoint", str(untrained / "run/embedder"), "--port", "0", "--device", "cpu", "--no-browser"]
    flags += ["--stride", "2"]
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
        idle = socket.create_connection(("127.0.0.1", address.port))  # as browsers do
        queued = []  # images of 6,000 tokens, of which the towers take many seconds
        for seed in range(6):
            data = encode(picture(seed, 32, 800))
            head = f"POST /api/image?{address.query} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
            queued.append(socket.create_connection(("127.0.0.1", address.port)))
            queued[-1].sendall(head.encode() + data)
        time.sleep(0.2)
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
        assert (process.returncode, error) == (130, "")
        assert time.monotonic() - start < 3  # half a second on an idle machine
        for connection in (idle, *queued):
            connection.close()
    finally:
        process.kill()
        process.wait()
