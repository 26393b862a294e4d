"""A segmentation dataset of your own, and Karpathy's splits, in `pacl evaluate`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from pacl.cli import main
from pacl.data.sources import open_pairs
from pacl.evaluate.own_data import OwnData
from pacl.evaluate.segmentation_check import check_segmentation
from PIL import Image

CLASSES = "background\ndog, puppy\ngrass\n"
TRUTH = {"a": [0, 1, 2, 255], "b/c": [2, 2, 1, 0], "d": [1, 1, 1, 1]}


@pytest.fixture
def world(tmp_path) -> Path:
    """Write three images, of two formats and one in a subfolder, whose masks have the columns of TRUTH."""
    folder = tmp_path / "farm"
    for name, values in TRUTH.items():
        for part, suffix in (("images", ".png" if name == "d" else ".JPG"), ("masks", ".png")):
            path = folder / part / f"{name}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            mask = np.repeat(np.array([values], np.uint8), 10, 1).repeat(30, 0)
            (Image.fromarray(mask) if part == "masks" else Image.fromarray(mask * 60).convert("RGB")).save(
                path, "PNG" if path.suffix == ".png" else "JPEG"
            )
    (folder / "images/notes.txt").write_text("no image")
    (folder / "classes.txt").write_text(CLASSES)
    return folder


def test_images_masks_and_classes(world):
    data = OwnData(world)
    assert data.names == ["a", "b/c", "d"] and data.classes == ["background", "dog", "grass"]
    assert data.synonyms[1] == ["dog", "puppy"] and data.spec.background and data.spec.name == "folder:farm"
    for (image, labels), values in zip((data[i] for i in range(3)), TRUTH.values(), strict=True):
        assert image.size == (40, 30) and image.mode == "RGB"
        assert labels[5, ::10].tolist() == [-1 if x == 255 else x for x in values]
    assert OwnData(world, limit=1).names == ["a"]
    (world / "names.txt").write_text("sky\n" + "\n".join(f"class {i}" for i in range(300)) + "\n")
    many = OwnData(world, class_file=world / "names.txt")
    assert not many.spec.background and many[0][1][0, -1] == 255  # a class of its own, and 65535 does not count


def test_commands(world, untrained, tmp_path, capsys):
    data = ["--data-root", str(world), "--dataset", "folder", "--out", str(tmp_path / "results")]
    assert main(["evaluate", "segmentation", *data, "--check"]) == 0
    shown = capsys.readouterr().out
    assert "farm, 3 classes: 3 of 3 images" in shown and "no problem found" in shown
    assert (tmp_path / "results/folder-farm_check.png").is_file()
    rules = {"short_side": 64, "templates": ["{}"], "background": {"rule": "class"}, "foreground": True}
    (tmp_path / "small.json").write_text(json.dumps(rules))
    protocol = ["--protocol", str(tmp_path / "small.json")]
    model = ["--model", f"local-dir:{untrained / 'clip'}", *protocol, "--device", "cpu"]
    assert main(["evaluate", "segmentation", *data, *model]) == 0
    (path,) = (tmp_path / "results").glob("*.json")
    row = json.loads(path.read_text())
    assert row["dataset"] == "folder:farm" and row["images"] == row["images_of_the_set"] == 3
    assert path.with_suffix(".png").is_file() and set(row["metrics"]["IoU"]) == {"dog", "grass"}
    capsys.readouterr()
    assert main(["evaluate", "table", str(path)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[1].split()[:2] == ["mIoU", "farm"] and not table[2].split()[-1].endswith(("*", "#"))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x: (x / "classes.txt").unlink(), r"data: .*classes.txt does not exist; expected images/NAME"),
        (lambda x: (x / "masks/d.png").unlink(), r"data: .* has 2 of the 3 images with masks .*that of d"),
        (lambda x: (x / "masks/d.png").rename(x / "masks/e.png"), r"data: .* has 2 of the 3 images"),
        (lambda x: (x / "images/a.jpg").write_bytes(b""), "have the same name, expected one image for each mask"),
        (lambda x: (x / "classes.txt").write_text("dog\ndog\n"), "has the class 'dog' twice"),
    ],
)
def test_errors_name_the_file(change, message, world):
    change(world)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        OwnData(world)


def test_labels_beyond_the_classes_and_shifted_ones(world):
    (world / "classes.txt").write_text("background\ndog\n")
    assert "values 2 are not labels of masks/*.png" in check_segmentation("folder", world).problems[0]
    with pytest.raises(ValueError, match="the mask of a has the values 2, which masks/.* does not have"):
        OwnData(world)[0]
    (world / "classes.txt").write_text("background\ndog\ngrass\nsky\n")
    assert "labels are probably one too low" in check_segmentation("folder", world).problems[0]
    (world / "classes.txt").write_text("background\ndog\ngrass\nsky\nsea\n")
    assert not check_segmentation("folder", world).problems  # your own images may well lack classes


# Karpathy's splits

SPLITS = ["train", "restval", "val", "test", "test"]


def write_karpathy(folder: Path, *, coco: bool) -> Path:
    images = []
    for i, split in enumerate(SPLITS):
        place = folder / ("val2014" if coco else "") / f"{i}.jpg"
        place.parent.mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), (40 * i, 0, 0)).save(place)
        sentences = [{"raw": f"caption {k} of {i}", "tokens": [], "imgid": i} for k in range(5 + i % 2)]
        place_of = {"filepath": "val2014"} if coco else {}
        images.append({**place_of, "filename": f"{i}.jpg", "imgid": i, "split": split, "sentences": sentences})
    path = folder / f"dataset_{'coco' if coco else 'flickr30k'}.json"
    path.write_text(json.dumps({"images": images, "dataset": "x"}))
    return path


@pytest.mark.parametrize("coco", [True, False], ids=["coco", "flickr30k"])
def test_a_split_has_all_sentences_of_its_images(coco, tmp_path):
    path = write_karpathy(tmp_path, coco=coco)
    for split, members in (("train", [0, 1]), ("val", [2]), ("test", [3, 4])):
        found = list(open_pairs(path, split=split, captions="all"))
        assert [len(x["captions"]) for x in found] == [5 + i % 2 for i in members]
        assert [x["captions"][1] for x in found] == [f"caption 1 of {i}" for i in members]
        assert [Path(x["key"]).name for x in found] == [f"{i}.jpg" for i in members]
    with pytest.raises(ValueError, match="split: got none for .*expected train, val or test"):
        open_pairs(path)
    with pytest.raises(ValueError, match="split: got 'test' for folder, expected none; only Karpathy"):
        open_pairs(tmp_path, split="test")


def test_retrieval_on_a_split(untrained, tmp_path):
    path = write_karpathy(tmp_path, coco=True)
    words = ["--data", str(path), "--split", "test", "--model", f"local-dir:{untrained / 'clip'}", "--device", "cpu"]
    assert main(["evaluate", "retrieval", *words, "--workers", "0", "--out", str(tmp_path / "results")]) == 0
    (result,) = (tmp_path / "results").glob("dataset-coco-test*.json")
    row = json.loads(result.read_text())
    assert row["dataset"] == "dataset_coco_test" and (row["images"], row["texts"]) == (2, 11)
