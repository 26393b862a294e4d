"""The last line of a command names the next one, which runs; the exit status says whether something was left out."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("open_clip")
pytest.importorskip("tyro")
from pacl.cli import main
from pacl.commands import LEFT_OUT
from pacl.flags import parse
from pacl.segment.options import ServeOptions
from pacl.training.config import TrainConfig
from pictures import encode, picture


def run(capsys, *argv) -> tuple[int, list[str]]:
    """Run a command; return its exit status and the words of the next command, which its last line names."""
    status = main([str(word) for word in argv])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("Next: pacl "), last
    return status, shlex.split(last)[2:]


def write_pairs(folder: Path, *broken: int) -> Path:
    folder.mkdir()
    for number in range(6):
        image = encode(picture(number, 32, 32), "PNG")
        (folder / f"{number}.png").write_bytes(image[:60] if number in broken else image)
        (folder / f"{number}.txt").write_text(f"picture {number}")
    return folder


def test_from_pairs_to_shards_to_training(tmp_path, capsys, monkeypatch):
    """Folders with blanks in their names; the flags of the data are passed on."""
    monkeypatch.chdir(tmp_path)
    good, bad = write_pairs(tmp_path / "good pairs"), write_pairs(tmp_path / "bad pairs", 1, 4)
    status, words = run(capsys, "data", "check", good, "--dataset-type", "folder")
    assert status == 0 and words[:3] == ["train", "--train-data", str(good)]
    assert parse(TrainConfig, words[1:], "pacl train").dataset_type == "folder"
    status, words = run(capsys, "data", "check", bad, "--dataset-type", "folder")
    assert (status, words) == (
        LEFT_OUT,
        ["data", "pack", str(bad), "--dataset-type", "folder", "--out", "packed"],
    )
    for _ in range(2):  # once done, the same command changes nothing
        status, following = run(capsys, *words)
        assert status == LEFT_OUT and following[:3] == ["train", "--train-data", "packed"]
    config = parse(TrainConfig, following[1:], "pacl train").check()
    assert (config.model, config.pretrained) == ("ViT-B-16", "openai")
    status, words = run(capsys, "data", "pack", good, "--out", "all of them")
    assert status == 0 and words[:3] == ["train", "--train-data", "all of them"]
    assert run(capsys, "data", "check", "all of them")[0] == 0


def test_a_source_without_a_good_pair(tmp_path, capsys):
    folder = write_pairs(tmp_path / "pairs", *range(6))
    assert main(["data", "check", str(folder)]) == 1
    assert "Next" not in capsys.readouterr().out
    assert main(["data", "check", str(write_pairs(tmp_path / "one", 1)), "--json"]) == LEFT_OUT
    assert json.loads(capsys.readouterr().out)["bad"] == {"image": 1}, "the report is not JSON alone"


def test_from_features_to_a_page(run_world, tmp_path, capsys):
    """Each printed command is run; only its length is added."""
    features, logs = tmp_path / "the features", tmp_path / "logs"
    scenes, model = run_world / "scenes", f"local-dir:{run_world / 'clip'}"
    short = ["--workers", "0"]
    pairs = ["--train-data", scenes / "train-000.tar", "--model", model]
    few = ["--train-data", "synthetic", "--train-num-samples", "12", "--model", model]
    status, words = run(capsys, "features", *few, "--out", features, "--nouns", "words", *short)
    assert (status, words) == (0, ["train", "--features", str(features), "--nouns", "words"])
    training = ["--log-dir", logs, "--batch-size", "8", "--max-steps", "2", "--report-to", "none", *short]
    status, words = run(capsys, *words, *training, "--name", "one")
    assert (status, words) == (0, ["serve", "--checkpoint", str(logs / "one")])
    assert parse(ServeOptions, words[1:], "pacl serve").checkpoint == str(logs / "one")
    data = ["--val-data", scenes / "eval-000.tar", "--max-image-pixels", "100000"]
    status, words = run(capsys, "train", *pairs, *training, "--name", "two", *data)
    assert status == 0 and words[:2] == ["evaluate", "retrieval"] and "100000" in words
    results, page = tmp_path / "results", tmp_path / "a page.html"
    status, words = run(capsys, *words, *short, "--out", results)
    assert (status, words) == (0, ["compare", str(logs / "two"), str(results)])
    assert main([*words, "--out", str(page)]) == 0
    assert capsys.readouterr().out.splitlines() == [str(page), f"Next: open {page} in a browser"]
    (results / "other.json").write_text("{}")
    assert main([*words, "--out", str(page)]) == LEFT_OUT


def test_bad_pairs_of_an_evaluation_are_left_out_and_counted(untrained, tmp_path, capsys):
    folder = write_pairs(tmp_path / "pairs", 2)
    flags = ["--model", f"local-dir:{untrained / 'clip'}", "--workers", "0", "--out", tmp_path / "out"]
    status, words = run(capsys, "evaluate", "retrieval", "--data", folder, *flags)
    assert (status, words) == (LEFT_OUT, ["compare", str(tmp_path / "out")])
    shutil.rmtree(tmp_path / "out")
    (folder / "2.png").unlink(), (folder / "2.txt").unlink()
    assert run(capsys, "evaluate", "retrieval", "--data", folder, *flags)[0] == 0


@pytest.mark.skipif(os.name == "nt", reason="Windows has other pipes")
def test_a_reader_that_has_seen_enough_is_no_error():
    """`pacl data --help | head -0`."""
    code = "import sys; from pacl.cli import main; sys.exit(main(['data', '--help']))"
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as closed:
        done = subprocess.run([sys.executable, "-uc", code], stdout=closed, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (141, b"")
