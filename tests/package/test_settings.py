"""Settings files that are damaged or hostile, and the same numbers as flags: one sentence with file and key."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("open_clip")
pytest.importorskip("tyro")
import yaml
from pacl.cli import main
from pacl.compare.entries import is_number, read_lines
from pacl.data.features import read_manifest
from pacl.data.shards import count_shards
from pacl.embedder import VisionEmbedder
from pacl.evaluate.results import read_result
from pacl.evaluate.segmentation_data import decode_rle
from pacl.evaluate.specs import protocol
from pacl.formats import one_line
from pacl.settings import read_settings
from pacl.sharing import load_pacl
from pacl.training.config import TrainConfig, dump_config, read_config

DEEP = 100_000
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.yaml", LAUGHS, "line 2 has an alias, expected plain values"),
        ("a.yaml", "[" * DEEP, "line 1 is nested deeper than 50 levels"),
        ("a.yaml", "a: 1\nb: 2\na: 3\n", "line 3 has the key 'a' again"),
        ("a.yaml", "a: [", "is not YAML"),
        ("a.yaml", "a: !!python/object/apply:os.system [touch x]", "is not YAML"),
        ("a.yaml", "<<: {a: 1}", "line 1 has a key that is not a word"),
        ("a.yaml", "a: 2026-99-99", "has a value that YAML cannot represent"),
        ("a.yaml", f"a: {'9' * 5000}", "has a value that YAML cannot represent"),
        ("a.yaml", f"a: 0x{'f' * 5000}", "line 1 has an integer of more than 64 bits"),
        ("a.yaml", "1: 2", "has the key 1, expected a string"),
        ("a.yaml", "a: \x00", "has characters that YAML does not allow"),
        ("a.yaml", "", "it is an empty file"),
        ("a.yaml", "#" * (2**20 + 1), "has more than 1,048,576 bytes"),
        ("a.json", "[" * DEEP, "nested deeper than 50 levels"),
        ("a.json", '{"a":' * 60 + "1" + "}" * 60, "nested deeper than 50 levels"),
        ("a.json", '{"a": 1, "a": 2}', "has the key 'a' twice"),
        ("a.json", '{"a": ', "line 1, column 7 is not JSON"),
        ("a.json", f'{{"a": {"9" * 5000}}}', "has an integer of more than 64 bits"),
        ("a.json", "[1]", "holds [1], expected a mapping"),
        ("a.json", '"\x1b[31m"', "is not JSON"),
        ("a.json", '{"\\u001b[31m": 1, "\\u001b[31m": 2}', "has the key '\\x1b[31m' twice"),
        ("a.json", b"\xff\xfe", "byte 0 is not UTF-8"),
    ],
)
def test_hostile_files_end_in_a_sentence(name, text, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError) as found:
        read_settings(path)
    sentence = str(found.value)
    assert sentence.startswith(f"{path} is damaged: ") and message in sentence
    assert sentence == one_line(sentence) and len(sentence) < len(str(path)) + 150


def write_config(folder: Path, **changes: Any) -> Path:
    values = yaml.safe_load(dump_config(TrainConfig(train_data="a.tar"), {})) | changes
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return folder / "config.yaml"


def test_a_config_comes_back(tmp_path):
    config = TrainConfig(features="f", val_classes=Path("c"), lr=1e-3, max_steps=7, name="a/b")
    (tmp_path / "config.yaml").write_text(dump_config(config, {"deviations": {}}))
    assert read_config(tmp_path / "config.yaml") == config
    text = (tmp_path / "config.yaml").read_text().replace("lr: 0.001", "lr: 1e-3").replace("wd: 0.2", "wd: 1")
    (tmp_path / "config.yaml").write_text(text)
    assert read_config(tmp_path / "config.yaml") == dataclasses.replace(config, wd=1)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"max_steps": 2.5}, "max_steps is 2.5, expected an integer or nothing"),
        ({"batch_size": "12"}, "batch_size is '12', expected an integer"),
        ({"batch_size": True}, "batch_size is True, expected an integer"),
        ({"lr": [1, 2]}, "lr is [1, 2], expected a finite number"),
        ({"lr": float("nan")}, "lr is nan, expected a finite number"),
        ({"lr": "fast"}, "lr is 'fast', expected a finite number"),
        ({"form": "mean"}, "form is 'mean', expected one of dot, cosine, max"),
        ({"lock_image": 1}, "lock_image is 1, expected true or false"),
        ({"log_dir": 3}, "log_dir is 3, expected a path"),
        ({"name": None}, "name is nothing, expected a string"),
        ({"train_data": {"a": 1}}, "train_data is {'a': 1}, expected a string or nothing"),
        ({"colour": "red"}, "it has the unknown key 'colour'"),
    ],
)
def test_wrong_values_of_a_run(changes, message, tmp_path, capsys):
    path = write_config(tmp_path, **changes)
    assert main(["train", "--config", str(path)]) == 1
    assert capsys.readouterr().err == f"pacl: error: {path} is damaged: {message}\n"


@pytest.mark.parametrize("name", ["../up", "/tmp/elsewhere", "a/../../b", "", ".", "a\x1b[31m"])
def test_a_run_stays_in_its_log_folder(name, tmp_path, capsys):
    path = write_config(tmp_path, name=name)
    for words in (["--config", str(path)], ["--train-data", "a.tar", "--name", name]):
        assert main(["train", *words]) == 1
        assert capsys.readouterr().err.endswith("expected the name of a folder inside LOG_DIR\n")


@pytest.mark.parametrize(
    "words, message",
    [
        (["train", "--train-data", "a", "--batch-size", "0"], "batch_size: got 0, expected at least 1"),
        (["train", "--train-data", "a", "--max-steps", "-3"], "max_steps: got -3, expected a number above 0"),
        (["train", "--train-data", "a", "--lr", "inf"], "lr: got inf, expected a finite number"),
        (["train", "--train-data", "a", "--beta2", "1"], "beta2: got 1.0, expected a number from 0 to below 1"),
        (["features", "--train-data", "a", "--out", "o", "--workers", "-1"], "workers: got -1, expected at least 0"),
        (["data", "check", "synthetic", "--scenes", "0"], "scenes: got 0, expected at least 1"),
        (["data", "pack", "synthetic", "--out", "o", "--max-image-pixels", "-5"], "max_image_pixels: got -5, expected"),
        (["evaluate", "retrieval", "--data", "a", "--batch-size", "0"], "batch_size: got 0, expected at least 1"),
        (
            ["evaluate", "segmentation", "--dataset", "voc20", "--data-root", ".", "--limit", "0"],
            "limit: got 0, expected",
        ),
        (["segment", "a.png", "--words", "a", "--model", "x", "--threshold", "nan"], "threshold: got nan, expected a"),
        (["look", "a.png", "--words", "a", "--model", "x", "--stride", "0"], "stride: got 0, expected at least 1"),
        (["compare", "a", "--stride", "-1"], "stride: got -1, expected at least 1"),
        (["serve", "--model", "x", "--max-image-pixels", "0"], "max_image_pixels: got 0, expected at least 1"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_flags_out_of_range(words, message, capsys):
    assert main(words) == 1
    assert capsys.readouterr().err.startswith(f"pacl: error: {message}")


@pytest.fixture
def embedder(untrained, tmp_path) -> Path:
    """Copy an embedder with its CLIP and return its config.json."""
    for name in ("clip", "run"):
        shutil.copytree(untrained / name, tmp_path / name)
    return tmp_path / "run/embedder/config.json"


JUNK = (None, True, -1, 0, 2.5, 1e300, "", "x", "\x1b[2J", [], [1], {}, {"a": []}, [[[[]]]])


def paths_of(value: Any, path: tuple = ()) -> list[tuple]:
    """Return the places of all values in nested dicts, and of the first of each list."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    return found + [place for key, x in items for place in paths_of(x, (*path, key))]


def changed(value: Any, path: tuple, new: Any) -> Any:
    """Return a copy with another value at `path`, or without one if `new` is `changed` itself."""
    value = copy.deepcopy(value)
    inside = value
    for key in path[:-1]:
        inside = inside[key]
    if new is changed:
        del inside[path[-1]]
    else:
        inside[path[-1]] = new
    return value


def damage(whole: Any, count: int) -> list[Any]:
    """Return all files with one key less, and `count` with other values, by a fixed seed."""
    rng, places = random.Random(24), paths_of(whole)
    fewer = [changed(whole, path, changed) for path in places]
    return fewer + [changed(whole, rng.choice(places), rng.choice(JUNK)) for _ in range(count)]


def assert_one_sentence(load: Any, path: Path, values: Any) -> None:
    path.write_text(json.dumps(values))
    try:
        load()
    except (ValueError, OSError) as error:
        assert "\n" not in str(error) and "0x" not in str(error), values


def test_settings_of_embedders(embedder):
    whole = json.loads(embedder.read_text())
    for values in damage(whole, 20):
        assert_one_sentence(lambda: VisionEmbedder.from_pretrained(embedder.parent), embedder, values)
    for path, new, message in (
        (("in_dim",), "128", "in_dim is '128', expected an integer"),
        (("in_dim",), 2**40, "in_dim is 1099511627776, expected 1 to 1,048,576"),
        (("form",), "mean", "form is 'mean', expected one of"),
        (("attn_temperature",), 0, "attn_temperature is 0, expected a number above 0"),
        (("towers", "fingerprint", "text"), ["x"], r"towers.fingerprint.text\[0\] is 'x', expected a finite number"),
        (("towers", "trained"), ["../x"], r"towers.trained\[0\] is '../x', expected one of visual, text"),
        (("towers", "activation"), {}, "towers.activation.text is missing"),
        (("sha256",), 3, "sha256 is 3, expected a mapping"),
    ):
        embedder.write_text(json.dumps(changed(whole, path, new)))
        with pytest.raises(ValueError, match=f"config.json is damaged: {message}"):
            load_pacl(embedder.parent)


def test_manifests(tmp_path):
    towers = {"model": "m", "pretrained": None, "vision_model": None, "vision_pretrained": True}
    plan = towers | {"force_image_size": None, "nouns": "words", "seed": 0}
    shard = {"name": "features-00000.safetensors", "bytes": 3, "count": 2}
    (tmp_path / shard["name"]).write_bytes(b"abc")
    path, whole = tmp_path / "manifest.json", {"complete": False, "plan": plan, "shards": [shard], "nouns": ["dog"]}
    path.write_text(json.dumps(whole))
    assert read_manifest(tmp_path) == whole
    for values in damage(whole, 40):
        assert_one_sentence(lambda: read_manifest(tmp_path), path, values)
    for place, new, message in (
        (("shards", 0, "count"), 2.0, r"shards\[0\].count is 2.0, expected an integer"),
        (("shards", 0, "count"), -2, "features-00000.safetensors has a count of -2, expected at least 1"),
        (("plan", "nouns"), ["words"], r"plan.nouns is \['words'\], expected one of words, nltk or nothing"),
        (("complete",), "yes", "complete is 'yes', expected true or false"),
    ):
        path.write_text(json.dumps(changed(whole, place, new)))
        with pytest.raises(ValueError, match=f"manifest.json is damaged: {message}"):
            read_manifest(tmp_path)


ROW = {
    "dataset": "voc20",
    "model": "m",
    "pretrained": None,
    "embedder": "e",
    "task": "zeroshot_segmentation",
    "language": "en",
    "protocol": {"name": "tcl", "short_side": 448},
    "images": 1449,
    "classes": {"sha256": "abc"},
    "warnings": ["some"],
    "metrics": {"mIoU": 41.25, "IoU": {"dog": None}},
}


def test_results(tmp_path, capsys):
    path = tmp_path / "row.json"
    for row in (ROW, ROW | {"task": "retrieval", "metrics": {"recall": 0.5}}):
        path.write_text(json.dumps(row))
        assert read_result(path) == row
        for values in damage(row, 12):
            path.write_text(json.dumps(values))
            assert main(["evaluate", "table", str(path)]) in (0, 1)
            assert main(["compare", str(path), "--out", str(tmp_path / "page.html")]) in (0, 1)
            found = capsys.readouterr()
            assert "\x1b" not in found.out + found.err, values


def test_control_characters_of_files_are_not_printed(tmp_path, capsys):
    row = ROW | {
        "task": "retrieval",
        "model": "red \x1b[31m\x07",
        "dataset": "\x1b]0;title\x07",
        "metrics": {"r\x9b": 1},
    }
    (tmp_path / "row.json").write_text(json.dumps(row))
    assert main(["evaluate", "table", str(tmp_path / "row.json")]) == 0
    (tmp_path / "bad\x1b[31m.csv").write_text("filepath\ttitle\n\x1b[31m.jpg\ta\n")
    assert main(["data", "check", str(tmp_path / "bad\x1b[31m.csv")]) == 1
    assert main(["data", "check", str(tmp_path / "no\x1b[31m.csv")]) == 1
    assert main(["compare", str(tmp_path / "bad\x1b[31m.csv")]) == 1
    found = capsys.readouterr()
    text = (found.out + found.err).replace("\n", "")
    assert text.isprintable() and "red" in text


def test_addresses_are_not_printed():
    assert one_line(f"cannot read {object()!r} at all") == "cannot read a object at all"
    assert one_line("file <_io.BytesIO object at 0x7f0a>") == "file a BytesIO"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"short_side": "448"}, "short_side is '448', expected an integer"),
        ({"templates": [1]}, r"templates\[0\] is 1, expected a string"),
        ({"foreground": 1}, "foreground is 1, expected true or false"),
        ({"window": 3.5, "window_stride": 1}, "window is 3.5, expected an integer or nothing"),
    ],
)
def test_protocols(change, message, tmp_path):
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"short_side": 9, "templates": ["{}"], "background": {"rule": "class"}} | change))
    with pytest.raises(ValueError, match=f"own.json is damaged: {message}"):
        protocol(str(path))


@pytest.mark.parametrize(
    "text", ["[" * DEEP, '{"a.tar": 1e999}', '{"a.tar": 1.5}', '{"a.tar": true}', '{"a.tar": "x"}']
)
def test_sizes_that_are_no_numbers_are_counted_anew(text, write_tar, tmp_path):
    path = write_tar("a.tar", {"0.jpg": b"-", "0.txt": b"-"})
    (tmp_path / "sizes.json").write_text(text)
    assert count_shards([path]) == {path: 1}


def test_lines_of_logs(tmp_path):
    rows = [{"step": 1, "x": 2}, {"step": 2**70}, {"step": True}, {"step": 1.5}, {"step": -1}, [], {"step": 3}]
    text = "\n".join(map(json.dumps, rows)) + "\n" + "[" * DEEP + "\n"
    (tmp_path / "metrics.jsonl").write_text(text)
    assert read_lines(tmp_path / "metrics.jsonl") == ([rows[0], rows[-1]], 6)
    assert not any(map(is_number, (10**400, float("inf"), float("nan"), True, "1"))) and is_number(10**15)


def test_run_lengths_of_many_digits_end():
    with pytest.raises(ValueError, match="more than 40 bits"):
        decode_rle("o" * 1_000_000, 4, 4)
