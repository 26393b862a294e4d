"""`pacl compare` on two small runs of `pacl train`, on results of `pacl evaluate`, and on missing or broken input."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from miniature import IDS, LAYOUTS, write
from pacl.cli import main
from pacl.compare.entries import read_lines
from pacl.segment.draw import overlay, word_colours
from pacl.segment.predict import Segmenter
from pacl.segment.prompts import TEMPLATES
from pacl.sharing import load_pacl
from pages import read
from pictures import encode, picture
from PIL import Image
from running import lines, train

torch.set_num_threads(1)
BAD = "<script>alert(1)<script>"  # a slash cannot be in a folder's name


@pytest.fixture(scope="module")
def world(run_world, tmp_path_factory) -> Path:
    """Create runs `one` and BAD, with different temperatures and learning rates, results of both, and images."""
    folder = tmp_path_factory.mktemp("compare")
    validation = {
        "val_data": run_world / "scenes/eval-000.tar",
        "val_segmentation": run_world / "scenes/eval-000.tar",
        "val_classes": run_world / "classes.txt",
        "val_frequency": 3,
    }
    assert train(run_world, folder / "logs", name="one", **validation) == 0
    changes = {"attn_temperature": 0.2, "lr": 0.01, "max_steps": 9}
    assert train(run_world, folder / "logs", name=BAD, **validation, **changes) == 0
    write(folder / "data", dict(zip(IDS, LAYOUTS, strict=True))["voc21 {}.png"])
    rules = {"short_side": 64, "templates": ["a {}.", "the {}."], "background": {"rule": "class"}}
    (folder / "small.json").write_text(json.dumps(rules))
    for run in ("one", BAD):
        common = ["--checkpoint", folder / "logs" / run / "embedder", "--out", folder / "results"]
        assert evaluate("segmentation", folder, *common, "--protocol", folder / "small.json", "--dataset", "voc20") == 0
        assert evaluate("alignment", folder, *common, "--templates", "none") == 0
    common[-2:] = ["--out", folder / "results"]
    assert evaluate("segmentation", folder, *common, "--protocol", folder / "small.json", "--dataset", "voc20",
                    "--stride", "2") == 0  # fmt: skip
    (folder / "images").mkdir()
    for i in range(3):
        (folder / f"images/{i}.png").write_bytes(encode(picture(i, 40, 64), "PNG"))
    (folder / "images/broken.png").write_bytes(b"no image")
    return folder


def evaluate(task: str, folder: Path, *words) -> int:
    return main(["evaluate", task, "--data-root", str(folder / "data"), "--partial", *map(str, words)])


def compare(*words) -> int:
    return main(["compare", *map(str, words)])


@pytest.fixture(scope="module")
def page(world):
    """Create a page that compares runs, results and images."""
    words = "dog,<script>alert(2)</script>,a & \"b\" 'c'"
    pictures = ["--images", world / "images", "--words", words, "--templates", "none", "--stride", "2"]
    out = world / "new/compare.html"
    runs = [world / "logs/one", world / "logs" / BAD]
    assert compare(*runs, world / "results", *pictures, "--out", out) == 3  # an image is damaged
    return read(out.read_bytes())


def table_with(page, head: str) -> dict[str, list[str]]:
    """Return the table whose first row contains `head`, as rows by their first cell."""
    (rows,) = [rows for rows in page.tables.values() if any(head in x for x in rows[0])]
    return {row[0]: row[1:] for row in rows}


def test_words_of_users_are_text(page):
    assert f"B {BAD}" in page.text and "<script>alert(2)</script>" in page.text and "a & \"b\" 'c'" in page.text


def test_settings_that_differ(world, page):
    configs = [yaml.safe_load((world / "logs" / run / "config.yaml").read_text()) for run in ("one", BAD)]
    (rows,) = [rows for rows in page.tables.values() if ["max_steps", "6", "9"] in rows]
    assert rows[0] == ["", "A one", f"B {BAD}"]
    assert {row[0] for row in rows[1:]} == {"attn_temperature", "lr", "max_steps"}
    different = {name for name in configs[0] if configs[0][name] != configs[1][name]}
    assert different == {"attn_temperature", "lr", "max_steps", "name"}
    assert ["attn_temperature", "0.05", "0.2"] in rows


def test_last_and_best_validation(world, page):
    table = table_with(page, "A one, last")
    found = [lines(world / "logs" / run / "results.jsonl") for run in ("one", BAD)]
    assert [len(x) for x in found] == [2, 3]
    for measure, better in (("mIoU", max), ("image_to_text_R@1", max), ("clip_val_loss", min)):
        expected = []
        for rows in found:
            best = better(rows, key=lambda row, m=measure: row[m])
            expected += [f"{rows[-1][measure]:.4f}", f"{best[measure]:.4f} at {best['step']:,}"]
        assert table[measure] == expected
    assert set(table) - {""} == set(found[0][0]) - {"step", "epoch"}
    assert "their numbers come from different data" not in page.text


def test_curves(page):
    pytest.importorskip("matplotlib")
    titles = ("training loss", "validation loss", "image to text R@1", "text to image R@1", "mIoU", "patch accuracy")
    assert {f"{x} by step" for x in titles} <= set(page.images)
    plots = [np.asarray(page.images[f"{x} by step"].convert("RGB")) for x in titles[:2]]
    for plot in plots:  # each run has a colour
        for colour in ((31, 119, 180), (255, 127, 14)):
            assert (plot == colour).all(-1).sum() > 100


def test_results_in_tables_by_protocol(world, page):
    rows = [json.loads(path.read_text()) for path in (world / "results").glob("*.json")]
    assert len(rows) == 5
    first, second = page.tables["protocol small"], page.tables["protocol small stride=2"]
    assert first[0] == ["mIoU", "VOC20", "Avg", "protocol"] and len(first) == 3 and len(second) == 2
    for row in rows:
        name = f"{row['model']} {row['embedder']}"
        if row["task"] == "zeroshot_segmentation":
            (line,) = [x for x in page.tables[f"protocol {row['protocol']['name']}"] if x[0] == name]
            assert line[1] == f"{row['metrics']['mIoU']:.2f}*" + ("!" if row["warnings"] else "")
    table = page.tables["patch_classification, voc20, protocol alignment embedder"]
    for row in rows:
        if row["task"] == "patch_classification":
            name = f"{row['model']} {row['embedder']}"
            line = dict(zip(table[0], next(x for x in table if x[0] == name), strict=True))
            assert all(line[metric] == f"{value:.4f}" for metric, value in row["metrics"].items())
            assert line["images"] == "3" and line["φ"] == "-"


def test_segmentations_are_the_embedders(world, page):
    words = ["dog", "<script>alert(2)</script>", "a & \"b\" 'c'"]
    shown = {}
    for letter, run in (("A", "one"), ("B", BAD)):
        segmenter = Segmenter(*load_pacl(world / "logs" / run / "embedder"), stride=2)
        image = Image.open(world / "images/1.png")
        labels = segmenter.labels(image, segmenter.texts(words, TEMPLATES["none"]))
        expected = overlay(image, labels, colours=word_colours(4)[1:]).resize((320, 200), Image.Resampling.NEAREST)
        shown[letter] = np.asarray(page.images[f"1.png by {letter} {run}"])
        assert np.array_equal(shown[letter], np.asarray(expected))
    assert not np.array_equal(shown["A"], shown["B"])
    assert {f"{i}.png" for i in range(3)} <= set(page.images) and "broken.png is skipped" in page.text


def test_embedder_folders_and_result_files(world, tmp_path, capsys):
    """An embedder's folder alone has no settings to compare. Two results of the same name are told apart by path."""
    shutil.copytree(world / "logs/one/embedder", tmp_path / "copied")
    (first,) = (world / "results").glob("voc20_clip_one_small.json")
    row = json.loads(first.read_text())
    row["metrics"]["mIoU"] = 99.0
    (tmp_path / "again.json").write_text(json.dumps(row))
    out = tmp_path / "page.html"
    assert compare(tmp_path / "copied", world / "logs/one/embedder", first, tmp_path / "again.json", "--out", out) == 0
    page = read(out.read_bytes())
    table = table_with(page, "A copied")
    assert "B one" in table[""] and table["steps"] == ["6", "6"] and table["attn_temperature"] == ["0.05", "0.05"]
    assert "Settings that differ" not in page.text and "Validation" not in page.text
    assert [line[0] for line in page.tables["protocol small"][1:]] == [
        f"clip one ({first})",
        f"clip one ({tmp_path / 'again.json'})",
    ]
    assert "Notes" not in page.text and capsys.readouterr().err == ""


def test_what_is_missing_is_said(world, tmp_path, capsys):
    run = tmp_path / "half"
    shutil.copytree(world / "logs/one", run)
    shutil.rmtree(run / "embedder")
    (run / "results.jsonl").unlink()
    (run / "config.yaml").write_text("a: [")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "trai')
    weights = tmp_path / "broken/model.safetensors"
    shutil.copytree(world / "logs/one/embedder", weights.parent)
    weights.write_bytes(weights.read_bytes()[:100])
    (tmp_path / "results").mkdir()
    (tmp_path / "results/other.json").write_text('{"a": 1}')
    out = tmp_path / "page.html"
    pictures = ["--images", world / "images/0.png", "--words", "dog,cat"]
    entries = [run, weights.parent, tmp_path / "results", world / "logs/one"]
    assert compare(*entries, *pictures, "--out", out) == 3
    said = capsys.readouterr().err
    page = read(out.read_bytes())
    for words in (
        "config.yaml is damaged: line 1 is not YAML",
        "results.jsonl is missing: no validation",
        "metrics.jsonl: 1 line(s) could not be read",
        f"{run / 'embedder'} is missing: no segmentations",
        f"{weights.parent} is not shown",
        "other.json is not a result of pacl evaluate",
    ):
        assert words in page.text and words in said
    assert set(page.images) >= {"0.png", "0.png by C one"} and "0.png by B broken" not in page.images
    assert table_with(page, "C one, last")["mIoU"][0]


@pytest.mark.parametrize(
    "words, message",
    [
        (["EMPTY"], "entries: got nothing to compare"),
        (["nowhere"], "nowhere does not exist"),
        (["RUN", "--images", "x"], "images: got x with --words None, expected both or neither"),
        (["RUN", "--images", "IMAGES", "--words", " , "], "words: got ' , '"),
        (["RUN", "--images", "EMPTY", "--words", "dog"], "images: got none in"),
        (["RUN", "--images", "IMAGES", "--words", "dog", "--templates", "no"], "templates: got 'no'"),
    ],
)
def test_errors_are_one_line(world, tmp_path, capsys, words, message):
    (tmp_path / "empty").mkdir()
    paths = {"EMPTY": tmp_path / "empty", "RUN": world / "logs/one", "IMAGES": world / "images"}
    assert compare(*(paths.get(x, x) for x in words), "--out", tmp_path / "page.html") == 1
    said = capsys.readouterr().err
    assert said.startswith("pacl: error: ") and said.count("\n") == 1 and message in said
    assert not (tmp_path / "page.html").exists()


def test_validation_on_other_data_is_said(world, tmp_path):
    shutil.copytree(world / "logs/one", tmp_path / "one", ignore=shutil.ignore_patterns("checkpoints"))
    config = tmp_path / "one/config.yaml"
    config.write_text(config.read_text().replace("eval-000.tar", "eval-001.tar"))
    assert compare(world / "logs/one", tmp_path / "one", "--out", tmp_path / "page.html") == 0
    page = (tmp_path / "page.html").read_bytes()
    assert "val_data and val_segmentation, so their numbers come from different data" in read(page).text
    assert b'class="best"' not in page


def test_without_matplotlib_the_page_says_so(world, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert compare(world / "logs/one", "--out", tmp_path / "page.html") == 0
    page = read((tmp_path / "page.html").read_bytes())
    assert "No plots: matplotlib is not installed" in page.text and not page.images


def test_other_towers_are_said(world, tmp_path):
    shutil.copytree(world / "logs/one/embedder", tmp_path / "other")
    config = json.loads((tmp_path / "other/config.json").read_text())
    prints = config["towers"]["fingerprint"]
    for factor, expected in ((1 + 1e-5, False), (1.1, True)):
        config["towers"]["fingerprint"] = prints | {"text": [factor * x for x in prints["text"]]}
        (tmp_path / "other/config.json").write_text(json.dumps(config))
        assert compare(world / "logs/one", tmp_path / "other", "--out", tmp_path / "page.html") == 0
        text = read((tmp_path / "page.html").read_bytes()).text
        assert ("the towers of B other differ from those of A one" in text) is expected


def test_few_of_many_images(world, tmp_path):
    (tmp_path / "images/sub").mkdir(parents=True)
    for i, name in enumerate(("0", "1", "2", "3", "sub/4")):
        (tmp_path / f"images/{name}.png").write_bytes((world / f"images/{i % 3}.png").read_bytes())
    pictures = ["--images", tmp_path / "images", "--words", "dog,cat", "--most-images", "2"]
    assert compare(world / "logs/one", *pictures, "--out", tmp_path / "page.html") == 0
    page = read((tmp_path / "page.html").read_bytes())
    assert {x for x in page.images if "by A" in x} == {"0.png by A one", "sub/4.png by A one"}
    assert "has 5 images; the page shows 2" in page.text


def test_lines_of_a_resumed_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [(2, "a"), (4, "b"), (6, "c"), (4, "d"), (6, "e")]
    path.write_text("".join(json.dumps({"step": step, "x": x}) + "\n" for step, x in rows) + '[1]\n{"x": 1}\n{"st')
    found, bad = read_lines(path)
    assert [(row["step"], row["x"]) for row in found] == [(2, "a"), (4, "d"), (6, "e")] and bad == 3
