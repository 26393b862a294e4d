"""`pacl evaluate` writes the same files from several processes as from one, with uneven and with empty shares."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import run_ranks
from miniature import mask, save
from pacl.cli import main
from pacl.demo.toy_clip import new_clip, save_clip
from pacl.embedder import VisionEmbedder, save_embedder
from pacl.sharing import describe_towers
from pacl.towers import load_towers
from PIL import Image

torch.set_num_threads(1)
WORDS = ["red", "green", "blue", "small", "large", "dog", "cat", "tree"]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Create an untrained CLIP, an embedder, five images of Pascal VOC, seven of three classes, and captions of five.

    A second file has captions of two images, fewer than three processes.
    """
    folder, rng = tmp_path_factory.mktemp("shared"), np.random.default_rng(0)
    torch.manual_seed(0)
    save_clip(new_clip(), folder / "clip")
    towers = load_towers(f"local-dir:{folder / 'clip'}")
    notes = describe_towers(towers, folder / "run/embedder")
    save_embedder(VisionEmbedder(128, 128), folder / "run/embedder", notes, steps=0)

    base, colours = folder / "VOCdevkit/VOC2012", rng.integers(0, 256, (256, 3))
    names = [f"2007_{i:06d}" for i in range(5)]
    for name in names:
        values = np.kron(rng.choice([0, 255, 3, 7, 9], (4, 4)), np.ones((16, 16), int))
        picture = (colours[values] + rng.integers(-9, 9, (64, 64, 3))).clip(0, 255).astype(np.uint8)
        save(Image.fromarray(picture), base / f"JPEGImages/{name}.jpg")
        save(mask(values, "P"), base / f"SegmentationClass/{name}.png")
    (base / "ImageSets/Segmentation").mkdir(parents=True)
    (base / "ImageSets/Segmentation/val.txt").write_text("\n".join(names))

    def picture():
        return Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))

    for i in range(7):
        save(picture(), folder / f"classes/{WORDS[i % 3]}/{i}.jpg")
    for i in range(5):
        save(picture(), folder / f"val/{i}.jpg")
    (folder / "val/4.jpg").write_bytes(b"\xff\xd8 no image")  # a bad image, which must be counted once
    for name, count in (("val", 5), ("two", 2)):
        images = [{"id": i, "file_name": f"{i}.jpg"} for i in range(count)]
        notes = [
            {"image_id": i, "caption": f"a {WORDS[i]} {WORDS[(i + j) % 5]} thing"}
            for i in range(count)
            for j in range(1 + i % 3)
        ]
        (folder / f"captions_{name}.json").write_text(json.dumps({"images": images, "annotations": notes}))
    return folder


def commands(world: Path, out: Path) -> list[list[str]]:
    model = ["--checkpoint", str(world / "run/embedder"), "--out"]
    found = []
    for few in (False, True):  # with two images, one of three processes has none
        limit, place = (["--limit", "2"], str(out / "few")) if few else ([], str(out))
        voc = ["--data-root", str(world), "--partial", *limit, *model, place]
        found.append(["alignment", *voc, "--dataset", "voc21", "--plain"])
        found.append(["coherence", *voc, "--patches", "60", "--pairs", "900"])
        images = ["--dataset", "folder", "--data-root", str(world / "classes"), "--batch-size", "2", "--workers", "1"]
        found.append(["classification", *images, *limit, *model, place])
        pairs = ["--data", str(world / f"captions_{'two' if few else 'val'}.json"), "--image-root", str(world / "val")]
        found.append(["retrieval", *pairs, "--plain", "--batch-size", "2", "--workers", "1", *model, place])
    return found


def results(out: Path) -> dict[str, dict]:
    return {path.relative_to(out).as_posix(): json.loads(path.read_text()) for path in out.rglob("*.json")}


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory) -> dict[str, dict]:
    out = tmp_path_factory.mktemp("alone")
    assert [main(["evaluate", *argv]) for argv in commands(world, out)] == [0, 0, 0, 3] + [0] * 4
    found = results(out)
    assert len(found) == 16
    assert found["captions-val_clip_run_retrieval-phi.json"]["skipped"] == {"image": 1}
    assert found["voc20_clip_run_coherence-vision.json"]["pairs"] == 900
    return found


def test_three_processes_are_one(world, alone, tmp_path):
    script = Path(__file__).with_name("task_ranks.py")
    out = tmp_path / "out"
    status, printed = run_ranks([script, json.dumps(commands(world, out))], 3, tmp_path / "printed")
    assert status == 0, printed[-3000:]
    assert results(out) == alone
    for line in ("retrieval phi", "alignment plain"):  # after the name of the data, unlike the lines of progress
        assert len(re.findall(rf"^\w+ {line}: ", printed, re.M)) == 2, "every process has printed its results"
    assert len(list(out.rglob("*.png"))) == 4
