"""`pacl look` and `pacl segment`: the files and pictures that they write, bad images, and odd words."""

import contextlib
import io
import json
import os
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from dies import fork_ranks
from forks import status
from pacl.cli import main
from pacl.commands import LEFT_OUT
from pacl.flags import parse
from pacl.segment.draw import SCALE, heat, label_image, overlay, png, voc_palette, with_legend, word_colours
from pacl.segment.options import ServeOptions
from pacl.segment.predict import Segmenter
from pacl.segment.run import _slug, _stems
from pacl.sharing import load_pacl
from pacl.towers import load_towers
from pictures import encode, picture
from PIL import Image

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
    (images / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0")
    os.mkfifo(images / "fifo.png")
    (images / "\x1b[2J.jpg").write_bytes(b"")
    return images


def run(untrained, command: str, *words, out) -> int:
    options = ["--checkpoint", untrained / "run/embedder", "--out", out, "--max-image-pixels", 8000]
    return main([command, *map(str, [*words, *options])])


def read(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


# Commands


def test_processes_share_the_images(images, untrained, tmp_path, capsys):
    """Three processes write the files of one, name every bad image once, and report the same."""
    words = [images, "--words", "dog,cat", "--short-side", 32]

    def found(out: Path) -> dict[str, bytes]:
        return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}

    assert run(untrained, "segment", *words, out=tmp_path / "one") == LEFT_OUT
    alone = capsys.readouterr()
    options = ["--checkpoint", untrained / "run/embedder", "--out", tmp_path / "three", "--max-image-pixels", 8000]
    for process in fork_ranks(["segment", *words, *options], 3, tmp_path / "printed"):
        assert status(process, 120) == LEFT_OUT
    assert found(tmp_path / "three") == found(tmp_path / "one")
    printed = (tmp_path / "printed").read_text().replace(str(tmp_path / "three"), str(tmp_path / "one"))
    own = [line for line in printed.splitlines() if not line.startswith("[")]  # those of Gloo
    assert sorted(own) == sorted((alone.out + alone.err).splitlines())


def test_look_at_a_folder(images, untrained, tmp_path, capsys):
    words = "dog,../../etc/x y,{0}"
    assert run(untrained, "look", images, "--words", words, out=tmp_path / "out") == LEFT_OUT
    said = capsys.readouterr()
    names = {f"{stem}-{name}.png" for stem in ("a", "a~2") for name in ("overlay", "01-dog", "02-etc_x_y", "03-0")}
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == names
    for bad, reason in (
        ("broken.png", "got a damaged or truncated PNG image"),
        ("large.png", r"90 x 90 pixels, more than 8,000 \(--max-image-pixels\)"),
        ("text.webp", "got a file of an unknown or damaged format, expected JPEG, PNG, .*"),
        ("photo.heic", "got HEIC, which is not read, expected JPEG, PNG, .*"),
        ("fifo.png", "is not a file"),
    ):
        assert re.search(rf"skipped .*/{bad}: {reason}\n", said.err)
    assert said.out.splitlines()[-2] == f"2 image(s) in {tmp_path / 'out'}, 6 skipped"
    assert said.err.count("\n") == 6 and "\x1b" not in said.err
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


def test_a_model_alone_is_read_in_the_best_way_and_says_so(images, untrained, tmp_path, capsys):
    model = f"local-dir:{untrained / 'clip'}"
    command = [str(images / "a.jpg"), "--model", model, "--words", "dog,sky", "--out", str(tmp_path)]
    for tokens, line in ((None, True), ("naclip", False), ("plain", False)):
        assert main(["segment", *command, *(["--tokens", tokens] if tokens else [])]) == 0
        said = capsys.readouterr().out
        assert ("tokens: naclip (the last block's reading with the best published maps)" in said) == line
        assert ("--tokens=" in said) == (not line)  # the next command keeps a flag
        settings = json.loads((tmp_path / "a-scores.json").read_text())["settings"]
        assert settings["tokens"] == (tokens or "naclip")
        towers = load_towers(model, tokens=tokens or "naclip")
        expected = Segmenter(towers).labels(Image.open(images / "a.jpg"), ["dog", "sky"])
        assert np.array_equal(read(tmp_path / "a-labels.png"), expected.numpy())
    assert main(["look", *command]) == 0
    assert "tokens: naclip" in capsys.readouterr().out


def test_another_reading_than_the_embedders(images, untrained, tmp_path, capsys):
    options = ["--words", "dog", "--tokens"]
    assert run(untrained, "look", images / "a.jpg", *options, "plain", out=tmp_path) == 0
    assert run(untrained, "look", images / "a.jpg", *options, "sclip", out=tmp_path) == 1
    error = capsys.readouterr().err
    assert re.search(r"tokens: got 'sclip', but the embedder of .*run/embedder was trained on 'plain'; expected", error)
    assert error.count("\n") == 1


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


def test_folders_in_a_folder(untrained, tmp_path, capsys, monkeypatch):
    """Results keep the folders of their images; hidden ones, the results themselves and other files are left alone."""
    monkeypatch.chdir(tmp_path)
    places = ["x.png", "x.jpg", "one/x.png", "one/two/x.png", "a b/x.png", "a_b/X.png", ".hidden/x.png", "one/._x.png"]
    for place in places:
        Path("photos", place).parent.mkdir(parents=True, exist_ok=True)
        Path("photos", place).write_bytes(encode(picture(0, 20, 20), "PNG"))
    Path("photos/notes.txt").write_text("left alone")
    Path("photos/one/loop").symlink_to("..")
    Path("photos/y.png").symlink_to("one/two/x.png")
    for _ in range(2):  # the second run finds the results of the first one in the folder
        arguments = ["photos", "photos/one", "--words", "dog"]
        assert run(untrained, "segment", *arguments, out="photos/out") == 0
        said = capsys.readouterr()
        assert "7 image(s) in photos/out\n" in said.out and not said.err
        stems = ["x", "x~2", "y", "one/x", "one/two/x", "a_b/x", "a_b/X~2"]
        names = {f"{stem}-{x}" for stem in stems for x in ("overlay.png", "labels.png", "scores.json")}
        found = {x.relative_to("photos/out").as_posix() for x in Path("photos/out").rglob("*") if x.is_file()}
        assert found == names
    assert run(untrained, "segment", "photos", "--words", "dog", out="photos/one/..") == 1
    assert "out: got photos/one/.., a folder of images, expected another folder" in capsys.readouterr().err


def test_the_next_command_works(images, untrained, tmp_path, capsys, monkeypatch):
    """`look` names `segment`, and that the page, with the user's own words and paths."""
    monkeypatch.chdir(tmp_path)
    arguments = [images / "a.jpg", "--words", "a dog's ball,grass", "--threshold", "-0.5", "--templates", "none"]
    assert run(untrained, "look", *arguments, "--scale=-0.1,0.3", out="out") == 0
    *_, line = capsys.readouterr().out.splitlines()
    assert line.startswith("Next: pacl segment ")
    assert main(shlex.split(line)[2:]) == 0
    scores = json.loads(Path("pacl-segment/a-scores.json").read_text())
    assert [x["name"] for x in scores["classes"]] == ["background", "a dog's ball", "grass"]
    assert scores["settings"]["threshold"] == -0.5 and scores["settings"]["templates"] == "none"
    *_, line = capsys.readouterr().out.splitlines()
    checkpoint = str(untrained / "run/embedder")
    assert shlex.split(line)[1:] == ["pacl", "serve", "--examples", str(images), f"--checkpoint={checkpoint}",
                                     "--templates=none", "--max-image-pixels=8000"]  # fmt: skip
    parse(ServeOptions, shlex.split(line)[3:], "pacl serve")


def test_maps_without_differences_say_so(images, untrained, tmp_path, capsys):
    """`look` proposes a scale where all cosines have the colour of one end of theirs."""
    arguments = [images / "a.jpg", "--words", "dog,grass"]
    for scale, end in (("0.5,1", "highest"), ("-2,-1", "lowest")):
        assert run(untrained, "look", *arguments, f"--scale={scale}", out=tmp_path) == 0
        (line,) = [line for line in capsys.readouterr().out.splitlines() if "uniformly" in line]
        low, high = map(float, scale.split(","))
        found = re.fullmatch(
            rf"On colours from {low:g} to {high:g}, the {end} cosine is (\S+), so the maps are uniformly "
            rf"{'dark' if end == 'highest' else 'bright'}: (--scale=\S+) shows differences.",
            line,
        )
        segmenter = Segmenter(*load_pacl(untrained / "run/embedder"))
        scores = segmenter.scores(Image.open(images / "a.jpg"), ["dog", "grass"])
        assert float(found[1]) == pytest.approx(float(scores.max() if end == "highest" else scores.min()), abs=0.005)
        low, high = map(float, found[2].removeprefix("--scale=").split(","))
        assert low <= scores.min() and scores.max() < high < scores.max() + 0.02
        assert run(untrained, "look", *arguments, found[2], out=tmp_path) == 0
        assert "uniformly" not in capsys.readouterr().out


def test_no_image_is_an_error(untrained, tmp_path, capsys):
    assert run(untrained, "look", tmp_path, "--words", "dog", out=tmp_path / "out") == 1
    assert f"images: got none in {tmp_path}, expected JPEG, PNG, WEBP, TIFF, BMP" in capsys.readouterr().err
    (tmp_path / "notes.txt").write_text("")
    assert run(untrained, "look", tmp_path, "--words", "dog", out=tmp_path / "out") == 1
    assert f"images: got none in {tmp_path} (1 other files), expected JPEG" in capsys.readouterr().err
    assert run(untrained, "look", tmp_path / "missing.jpg", "--words", "dog", out=tmp_path / "out") == 1
    said = capsys.readouterr()
    skipped, error = said.err.splitlines()
    assert not said.out
    assert skipped == f"skipped {tmp_path / 'missing.jpg'}: is not a file"
    assert error.startswith("pacl: error: images: got 1 that cannot be used, expected JPEG, PNG, ")
    assert main(["look", "x.jpg", "--model", "ViT-B-32", "--words", "dog"]) == 1
    assert "pretrained: got none for ViT-B-32, whose weights would be random" in capsys.readouterr().err


def test_a_full_disk_ends_the_run(images, untrained, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert run(untrained, "look", images / "a.jpg", "--words", "dog", out=blocked) == 1


def test_nobody_reads_the_output(images, untrained, tmp_path, capsys, monkeypatch):
    """`pacl look ... | head -1` ends; it does not take the closed pipe for a fault of every image."""
    reader, writer = os.pipe()
    os.close(reader)
    with contextlib.suppress(BrokenPipeError), os.fdopen(writer, "w") as stream:  # closing writes what is left
        monkeypatch.setattr(sys, "stdout", stream)
        assert run(untrained, "look", images / "a.jpg", "--words", "dog", out=tmp_path / "out") != 0
        monkeypatch.undo()
    assert "skipped" not in capsys.readouterr().err


def test_names_of_files():
    assert _slug("../../a\\b:c\x00") == "a_b_c" and _slug("rote Bälle") == "rote_Bälle" and _slug("???") == "_"
    assert len(_slug("x" * 500)) == 40 and _slug("कुत्ता, 狗") == "कुत्ता_狗"
    paths = [Path(folder, name) for folder in "ab" for name in ("x.jpg", "x.png", "y.png")]
    stems = list(_stems(paths, paths))
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
    sheet = with_legend(base, [((255, 0, 0), odd, "5 %"), ((0, 255, 0), "b", "")], (0.0, 0.5))
    assert sheet.width == 300 and sheet.height == 100 + 3 * 22 + 8
    assert sheet.crop((0, 0, 300, 100)).getcolors() == [(30000, (0, 0, 255))]
    found = np.asarray(sheet)[100:]
    assert (found == (255, 0, 0)).all(-1).sum() > 100 and (found == (0, 255, 0)).all(-1).sum() > 100
    assert with_legend(Image.new("RGB", (10, 10))).width == 320
    labels = torch.tensor([[0, 2], [1, 255]], dtype=torch.int16)
    again = Image.open(io.BytesIO(png(label_image(labels, voc_palette(256)))))
    assert np.array_equal(again, labels)
    assert again.convert("RGB").getpixel((1, 0)) == (0, 128, 0)
