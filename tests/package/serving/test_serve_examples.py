"""Examples are found by name alone, and their thumbnails are made when they are asked for, few and small."""

import io
import json

import numpy as np
import pytest
import torch
from pacl.serve import examples as module
from pacl.serve.examples import THUMBNAIL, Thumbnails, find_examples
from pacl.serve.server import Server
from pictures import encode, picture
from PIL import Image
from serving import another, call, refused, started

torch.set_num_threads(1)


@pytest.fixture
def folder(tmp_path):
    """Create a wide photo that its EXIF data turn upright, a small PNG, a large one and a damaged JPEG."""
    pixels = np.zeros((1600, 2400, 3), np.uint8)
    pixels[:, :1200, 0] = 255  # red on the left, which is the top after a turn to the right
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "1.jpg", exif=exif)
    Image.new("RGBA", (20, 10), (0, 0, 255, 255)).save(tmp_path / "2.png")
    Image.new("L", (300, 200)).save(tmp_path / "3.png")
    (tmp_path / "4.jpg").write_bytes(encode(picture(0, 64, 64))[:1200])
    return tmp_path


def test_thumbnails_are_small_and_upright(folder):
    found = find_examples(folder, None)
    assert [x.name for x in found] == ["1.jpg", "2.png", "3.png", "4.jpg"]
    thumbnails = Thumbnails(found)
    data = thumbnails.make(0, 10**7)
    small = Image.open(io.BytesIO(data))
    assert small.format == "JPEG" and small.height == THUMBNAIL[1] and small.width in (85, 86) and len(data) < 8000
    assert small.getpixel((40, 20))[0] > 200 > 50 > small.getpixel((40, 110))[0]
    assert Image.open(io.BytesIO(thumbnails.make(1, 10**7))).size == (20, 10)


def test_thumbnails_over_http(viewer, folder):
    with started(Server(another(viewer), examples=find_examples(folder, None))) as server:
        assert call(server, "GET", "/api/thumbnail/0", headers={})[0] == 403
        status, headers, data = call(server, "GET", "/api/thumbnail/1")
        assert status == 200 and headers["Content-Type"] == "image/jpeg" and data[:2] == b"\xff\xd8"
        for number, message in ((2, "400 300 x 200 pixels, more than 8,000"), (3, "400 image: got damaged data")):
            status, _, data = call(server, "GET", f"/api/thumbnail/{number}")
            assert refused(status, json.loads(data)).startswith(message)
        assert call(server, "GET", "/api/thumbnail/4")[0] == 404
        server.shutdown()


def test_thumbnails_are_made_late_and_few_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "KEPT_THUMBNAILS", 2)
    for number in range(401):
        (tmp_path / f"{number:03}.png").write_bytes(encode(picture(number, 4, 4), "PNG") if number < 3 else b"")
    thumbnails = Thumbnails(find_examples(tmp_path, None))  # reads none of them: all but three are empty
    made = [thumbnails.make(number, 100) for number in range(3)]
    for number in range(3):
        (tmp_path / f"{number:03}.png").unlink()
    assert [thumbnails.make(number, 100) for number in (2, 1)] == [made[2], made[1]]
    with pytest.raises(OSError):
        thumbnails.make(0, 100)


def test_the_demo_brings_scenes_by_its_folder_or_its_embedder(tmp_path):
    for name in ("clip", "scenes", "embedder"):
        (tmp_path / "demo" / name).mkdir(parents=True)
    assert [len(find_examples(None, str(tmp_path / name))) for name in ("demo", "demo/embedder", ".")] == [6, 6, 0]
