"""`pacl serve` gives the right answers over HTTP and runs each tower once."""

import base64
import hashlib
import io
import json
import re
import threading
import urllib.parse

import numpy as np
import pytest
import torch
from pacl.data.scenes import CLASSES
from pacl.segment.draw import word_colours
from pacl.segment.predict import similarity_map
from pacl.serve import viewer as viewing
from pacl.serve.examples import demo_scenes, find_examples
from pacl.serve.page import PAGE
from pacl.serve.server import Server
from pacl.sharing import load_pacl
from pictures import encode, picture
from PIL import Image
from serving import PHOTO, another, call, post, post_image, refused, started

torch.set_num_threads(1)


WORDS = ["a dog", "grass", "red ball"]


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
        assert words["colours"] == word_colours(4)[1:].tolist()  # the same as in pacl look
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
    """The vision tower runs once per image and model, and the text tower runs only for new words."""
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


def test_a_picture_of_a_kept_image(server, monkeypatch):
    monkeypatch.setattr(viewing, "PICTURE", 40)
    key = post_image(server, encode(picture(6, 32, 80), "TIFF"))
    status, headers, data = call(server, "POST", "/api/picture", json.dumps({"image": key}))
    assert status == 200 and headers["Content-Type"] == "image/jpeg"
    assert Image.open(io.BytesIO(data)).size == (40, 16)
    assert refused(*post(server, "/api/picture", {"image": "x"})).startswith("404 image: got an unknown")


def test_few_images_and_words_are_kept(server, viewer, monkeypatch):
    monkeypatch.setattr(viewing, "IMAGES", 2)
    monkeypatch.setattr(viewing, "KEPT_WORDS", 2)
    keys = [post_image(server, encode(picture(seed, 16, 16))) for seed in (20, 21)]
    status, answer = post(server, "/api/words", {"image": keys[0], "words": ["a", "b", "c"]})  # 20 is now the newest
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
    text = PAGE.decode()
    for word in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "Function(", "http:", "https:"):
        assert word not in text, word


def test_the_page_and_its_policy(server):
    status, headers, data = call(server, "GET", f"/?token={server.token}", headers={})
    assert status == 200 and data == PAGE and headers["Content-Type"] == "text/html; charset=utf-8"
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
    with started(Server(another(viewer), examples=examples)) as server:
        status, _, data = call(server, "GET", "/api/example/5")
        server.shutdown()
    scene = np.asarray(Image.open(io.BytesIO(data)))
    assert status == 200 and scene.shape == (64, 64, 3) and data == examples[5].image
    words = examples[5].words.split(", ")
    assert set(words) <= set(CLASSES) and 3 <= len(words) <= 5
