"""Slow images hold up no other request, and the end of the server does not wait for them."""

import contextlib
import http.client
import socket
import threading
import time

import pytest
import torch
from pacl.serve.gate import Gate, Unwanted
from pacl.serve.server import Server
from pictures import encode, picture
from serving import PHOTO, another, post, post_image, started

torch.set_num_threads(1)


class Slow:
    """Counts the images that are embedded, and holds up the next `held` of them until `go` is set."""

    def __init__(self, segmenter):
        self.go, self.inside, self.runs, self.held = threading.Event(), threading.Semaphore(0), 0, 0
        self.hook = segmenter.embed.register_forward_pre_hook(self.wait)

    def wait(self, *_):
        self.runs += 1
        if self.runs <= self.held:
            self.inside.release()
            assert self.go.wait(30)


@pytest.fixture
def slow(viewer):
    slow = Slow(viewer.segmenters["PACL"])
    yield slow
    slow.go.set()
    slow.hook.remove()


def upload(server, seed: int) -> threading.Thread:
    def send():
        with contextlib.suppress(OSError, http.client.HTTPException):  # the server may end before
            post(server, "/api/image", encode(picture(seed, 16, 24)))

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def test_a_slow_image_holds_up_nobody(viewer, slow):
    with started(Server(another(viewer))) as server:
        key = post_image(server)
        slow.held = slow.runs + 1
        thread = upload(server, 50)
        assert slow.inside.acquire(timeout=20)
        assert post(server, "/api/words", {"image": key, "words": ["a word never seen before"]})[0] == 200
        assert post(server, "/api/patch", {"image": key, "row": 0, "column": 0})[0] == 200
        other = post_image(server, encode(picture(51, 16, 24)))
        assert post(server, "/api/words", {"image": other, "words": ["grass"], "model": "CLIP"})[0] == 200
        assert thread.is_alive() and not slow.go.is_set()
        slow.go.set()
        thread.join(20)
        assert not thread.is_alive()
        server.shutdown()


def test_an_image_sent_twice_is_embedded_once(viewer, slow):
    with started(Server(another(viewer))) as server:
        slow.held = 1
        threads = [upload(server, 52) for _ in range(3)]
        assert slow.inside.acquire(timeout=20)
        slow.go.set()
        for thread in threads:
            thread.join(20)
        assert slow.runs == 1
        server.shutdown()


def test_uploads_that_nobody_waits_for_are_dropped(viewer, slow):
    with started(Server(another(viewer))) as server:
        slow.held = 2
        threads = [upload(server, seed) for seed in (53, 54)]
        assert all(slow.inside.acquire(timeout=20) for _ in threads)
        for seed in range(55, 60):  # a page that opens one image after another, and drops each request for the next
            with socket.create_connection(("127.0.0.1", server.server_port)) as connection:
                data = encode(picture(seed, 16, 24))
                head = f"POST /api/image HTTP/1.1\r\nHost: localhost\r\nX-Token: {server.token}\r\n"
                connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        slow.go.set()
        for thread in threads:
            thread.join(20)
        post_image(server, PHOTO)
        assert slow.runs == 3
        server.shutdown()


def test_the_end_drops_all_that_waits(viewer, slow):
    with started(Server(another(viewer))) as server:
        slow.held = 2
        threads = [upload(server, seed) for seed in range(60, 65)]
        assert all(slow.inside.acquire(timeout=20) for _ in range(2))
        server.shutdown()
        start = time.monotonic()
        server.server_close()
        assert time.monotonic() - start < 5 and not slow.go.is_set()
        while len(server.connections) > 2:  # those inside the tower; all other threads end without a turn
            assert time.monotonic() - start < 20
            time.sleep(0.01)
    slow.go.set()
    for thread in threads:
        thread.join(20)
    assert slow.runs == 2


def test_a_gate_lets_few_in_and_one_of_each_name():
    gate, inside, order = Gate(2), threading.Semaphore(0), []
    go = threading.Event()

    def work(name):
        with gate.enter(name):
            order.append(name)
            inside.release()
            assert go.wait(20)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("a", "a", "b", "c")]
    for thread in threads[:2]:
        thread.start()
    assert inside.acquire(timeout=20) and not inside.acquire(timeout=0.1) and order == ["a"]
    for thread in threads[2:]:
        thread.start()
    assert inside.acquire(timeout=20) and not inside.acquire(timeout=0.1) and len(order) == 2
    go.set()
    for thread in threads:
        thread.join(20)
    assert sorted(order) == ["a", "a", "b", "c"]
    with pytest.raises(Unwanted, match="left"), gate.enter("d", lambda: False):
        pass
    gate.close()
    with pytest.raises(Unwanted, match="ends"), gate.enter("d"):
        pass
