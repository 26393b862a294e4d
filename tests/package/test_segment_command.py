"""`pacl look` and `pacl segment`: the files and pictures that they write, bad images, and odd words."""

import io
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from pacl.cli import main
from pacl.segment.draw import SCALE, _fitting, heat, label_image, overlay, png, voc_palette, with_legend, word_colours
from pacl.segment.predict import Segmenter
from pacl.segment.run import _slug, _stems
from pacl.sharing import load_pacl
from pictures import encode, picture
from PIL import Image, ImageFont

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Create a folder of images, some of them bad."""
    images = tmp_path_factory.mktemp("images")
    (images / "a.jpg").write_bytes(encode(picture(0, 48, 64)))
    (images / "a.PNG").write_bytes(encode(picture(1, 70, 50)[:, :, 0], "PNG"))
    (images / "broken.png").write_bytes(encode(picture(2, 40, 40), "PNG")[:700])
    (images / "large.png").write_bytes(encode(picture(3, 90, 90), "PNG"))
    (images / "text.webp").write_bytes(b"no image")
    (images / "notes.txt").write_text("left alone")
    (images / "fifo.png").mkdir()
    (images / "\x1b[2J.jpg").write_bytes(b"")
    return images


def run(untrained, command: str, *words, out) -> int:
    options = ["--checkpoint", untrained / "run/embedder", "--out", out, "--max-image-pixels", 8000]
    return main([command, *map(str, [*words, *options])])


def read(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


# Commands


def test_look_at_a_folder(images, untrained, tmp_path, capsys):
    words = "dog,../../etc/x y,{0}"
    assert run(untrained, "look", images, "--words", words, out=tmp_path / "out") == 0
    said = capsys.readouterr()
    names = {f"{stem}-{name}.png" for stem in ("a", "a~2") for name in ("overlay", "01-dog", "02-etc_x_y", "03-0")}
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == names
    for bad, reason in (
        ("broken.png", ""),
        ("large.png", "90 x 90 pixels"),
        ("text.webp", ""),
        ("fifo.png", "is not a"),
    ):
        assert re.search(rf"skipped .*{bad}: .*{reason}", said.err)
    assert "2 image(s) in" in said.out and "5 skipped" in said.out and "\x1b" not in said.err
    # The printed numbers are those of the underlying functions.
    segmenter = Segmenter(*load_pacl(untrained / "run/embedder"))
    image = Image.open(images / "a.jpg")
    scores, labels = segmenter.scores(image, words.split(",")), segmenter.labels(image, words.split(","))
    table = said.out[said.out.index("a.jpg") :].splitlines()
    assert "64 x 48 pixels, 11 x 8 tokens" in table[0]
    for i, line in enumerate(table[2:5]):
        numbers = [float(x) for x in line.split()[-4:-1]]
        expected = [scores[i].max(), scores[i].mean(), 100 * (labels == i).float().mean()]
        assert numbers == pytest.approx([float(x) for x in expected], abs=0.06)


def test_segment_writes_labels_and_scores(images, untrained, tmp_path):
    (tmp_path / "classes.txt").write_text("background, sky\ndog, small dog\ngrass\n")
    options = ["--classes", tmp_path / "classes.txt", "--templates", "photo", "--stride", 2, "--short-side", 72]
    options += ["--window", 64, "--window-stride", 8]
    assert run(untrained, "segment", images / "a.jpg", *options, out=tmp_path / "out") == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"a-{x}" for x in ("overlay.png", "labels.png", "scores.json")
    }
    segmenter = Segmenter(*load_pacl(untrained / "run/embedder"), stride=2, short_side=72, window=64, window_stride=8)
    texts = segmenter.texts(["background, sky", "dog, small dog", "grass"], ["a photo of a {}."])
    expected = segmenter.labels(Image.open(images / "a.jpg"), texts).numpy()
    with Image.open(tmp_path / "out" / "a-labels.png") as found:
        assert found.mode == "P" and np.array_equal(found, expected)
        assert found.getpalette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]
    scores = json.loads((tmp_path / "out" / "a-scores.json").read_text())
    assert scores["size"] == [48, 64]
    found = {
        name: scores["settings"][name] for name in ("stride", "short_side", "window", "window_stride", "templates")
    }
    assert found == {"stride": 2, "short_side": 72, "window": 64, "window_stride": 8, "templates": "photo"}
    assert [x["name"] for x in scores["classes"]] == ["background", "dog", "grass"]
    assert [x["pixels"] for x in scores["classes"]] == pytest.approx([(expected == i).mean() for i in range(3)])


def test_segment_with_a_rule_for_background_and_plain_clip(images, untrained, tmp_path):
    command = ["segment", str(images / "a.jpg"), "--model", f"local-dir:{untrained / 'clip'}"]
    command += ["--words", "background,dog", "--out", str(tmp_path)]
    assert main([*command, "--threshold", "2"]) == 0
    assert not read(tmp_path / "a-labels.png").any()
    rows = json.loads((tmp_path / "a-scores.json").read_text())["classes"]
    assert [(x["label"], x["name"], x["pixels"]) for x in rows] == [
        (0, "background", 1),
        (1, "background", 0),
        (2, "dog", 0),
    ]
    assert main([*command, "--threshold", "-2"]) == 0
    assert read(tmp_path / "a-labels.png").min() >= 1


def test_more_classes_than_a_palette_holds(images, untrained, tmp_path):
    (tmp_path / "classes.txt").write_text("\n".join(f"thing {i}" for i in range(300)))
    options = ["--classes", tmp_path / "classes.txt", "--templates", "none"]
    assert run(untrained, "segment", images / "a.jpg", *options, out=tmp_path / "out") == 0
    segmenter = Segmenter(*load_pacl(untrained / "run/embedder"))
    texts = segmenter.texts([f"thing {i}" for i in range(300)], ["{}"])
    expected = segmenter.labels(Image.open(images / "a.jpg"), texts).numpy()
    assert np.array_equal(read(tmp_path / "out" / "a-labels.png"), expected)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--words", " , "], "classes: got "),
        (["--words", "dog", "--stride", "3"], "stride: got 3, expected a divisor of the patch of 8 pixels"),
        (["--words", "dog", "--templates", "x"], "templates: got 'x', expected none"),
        (["--classes", "missing.txt"], "missing.txt"),
        (["--classes", "gap.txt"], "classes: gap.txt line 2 is empty, expected a class in every line"),
    ],
)
def test_bad_arguments_are_one_line(images, untrained, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gap.txt").write_text("dog\n\ngrass\n")
    assert run(untrained, "segment", images / "a.jpg", *words, out=tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_no_image_is_an_error(untrained, tmp_path, capsys):
    assert run(untrained, "look", tmp_path, "--words", "dog", out=tmp_path / "out") == 1
    assert "images: got none in" in capsys.readouterr().err
    assert run(untrained, "look", tmp_path / "missing.jpg", "--words", "dog", out=tmp_path / "out") == 1
    assert "skipped" in capsys.readouterr().err
    assert main(["look", "x.jpg", "--model", "ViT-B-32", "--words", "dog"]) == 1
    assert "pretrained: got none for ViT-B-32, whose weights would be random" in capsys.readouterr().err


def test_a_full_disk_ends_the_run(images, untrained, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert run(untrained, "look", images / "a.jpg", "--words", "dog", out=blocked) == 1


def test_names_of_files():
    assert _slug("../../a\\b:c\x00") == "a_b_c" and _slug("rote Bälle") == "rote_Bälle" and _slug("???") == "_"
    assert len(_slug("x" * 500)) == 40
    paths = [os.path.join(folder, name) for folder in "ab" for name in ("x.jpg", "x.png", "y.png")]
    stems = list(_stems(map(Path, paths)))
    assert stems == ["x", "x~2", "y", "x~3", "x~4", "y~2"]


# Pictures


def test_voc_palette():
    expected = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128), (0, 128, 128)]
    expected += [(128, 128, 128), (64, 0, 0), (192, 0, 0), (64, 128, 0)]
    assert voc_palette(11).tolist() == [list(colour) for colour in expected]
    assert voc_palette(21)[20].tolist() == [0, 64, 128] and voc_palette(256)[255].tolist() == [224, 224, 192]
    assert len(np.unique(voc_palette(256), axis=0)) == 256


def test_word_colours_differ():
    colours = word_colours(12).astype(int)
    apart = np.abs(colours[:, None] - colours[None]).sum(-1) + 1000 * np.eye(12)
    assert apart.min() > 60


def test_an_absent_word_stays_dark():
    """Brightness shows the cosine itself, whatever the other values of the map are."""
    image = Image.new("RGB", (40, 30), "white")
    absent, present = np.full((3, 4), 0.02, np.float32), np.full((3, 4), 0.02, np.float32)
    absent[1, 1], present[1, 1] = 0.06, 0.54
    dark, bright = (np.asarray(overlay(image, x, alpha=1.0)).astype(int).sum(-1) for x in (absent, present))
    assert dark.max() < 150 and bright[15, 15] > 500
    assert len(np.unique(bright)) > 20  # smoothly enlarged
    assert heat(np.array([-1.0, 0.0, 0.6, 9.0])).tolist() == [[0, 0, 4], [0, 0, 4], [252, 253, 191], [252, 253, 191]]
    assert (np.diff(heat(np.linspace(*SCALE, 50)).astype(int).sum(-1)) > 0).all()


def test_overlay_of_labels():
    image = Image.fromarray(picture(0, 4, 6))
    labels = torch.zeros(4, 6, dtype=torch.int16)
    labels[1, 2] = 1
    out = np.asarray(overlay(image, labels, alpha=0.5)).astype(int)
    before = np.asarray(image).astype(int)
    changed = (out != before).any(-1)
    assert changed.sum() == 1 and changed[1, 2]
    assert np.abs(out[1, 2] - (before[1, 2] + [128, 0, 0]) / 2).max() <= 1
    clear = image.copy()
    clear.putalpha(0)  # the model sees it on a white background
    assert overlay(clear, torch.zeros_like(labels)).getpixel((0, 0)) == (255, 255, 255)
    with pytest.raises(ValueError, match=r"shown: got labels \[3, 6\], expected the image's \[4, 6\]"):
        overlay(image, labels[:3])
    with pytest.raises(ValueError, match="scale: got 1 to 0"):
        overlay(image, np.zeros((2, 2), np.float32), scale=(1, 0))


def test_legend_and_label_image():
    base = Image.new("RGB", (300, 100), "blue")
    odd = "two\nlines \x1b[31m" + "x" * 500
    sheet = with_legend(base, [((255, 0, 0), odd), ((0, 255, 0), "b")], (0.0, 0.5))
    assert sheet.width == 300 and sheet.height == 100 + 3 * 22 + 8
    assert sheet.crop((0, 0, 300, 100)).getcolors() == [(30000, (0, 0, 255))]
    found = np.asarray(sheet)[100:]
    assert (found == (255, 0, 0)).all(-1).sum() > 100 and (found == (0, 255, 0)).all(-1).sum() > 100
    assert with_legend(Image.new("RGB", (10, 10))).width == 320
    font = ImageFont.load_default(14)
    fitting = _fitting(odd, font, 150)
    assert fitting.startswith("two lines  [31mxx") and fitting.endswith("x...") and font.getlength(fitting) <= 150
    labels = torch.tensor([[0, 2], [1, 255]], dtype=torch.int16)
    again = Image.open(io.BytesIO(png(label_image(labels, voc_palette(256)))))
    assert np.array_equal(again, labels)
    assert again.convert("RGB").getpixel((1, 0)) == (0, 128, 0)
