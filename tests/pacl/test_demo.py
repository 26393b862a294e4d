"""The whole demo on a tiny setting: every file, the same numbers twice, and what an interrupt leaves."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from pacl.cli import main
from pacl.data.scenes import CLASSES
from pacl.demo.toy_clip import tokenizer
from pacl.embedder import VisionEmbedder
from pacl.sharing import load_pacl
from PIL import Image
from safetensors.torch import load_file


def start(out: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "pacl", "demo", "--quick", "--out", str(out), *options]
    # A test run in the background ignores Ctrl-C, and its children would inherit that.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, handler)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    process = start(out)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return out, printed


def test_metrics(finished):
    metrics = json.loads((finished[0] / "metrics.json").read_text())
    assert set(metrics) == {"clip", "pacl", "mean_pooling", "oracle", "seconds", "seed"}
    for method in ("clip", "pacl", "mean_pooling", "oracle"):
        for group in ("seen", "held_out"):
            assert set(metrics[method][group]) == {"miou", "patch_accuracy"}
            assert all(0 <= value <= 1 for value in metrics[method][group].values())
    assert metrics["oracle"]["seen"]["patch_accuracy"] == 1.0
    assert 0.7 < metrics["oracle"]["seen"]["miou"] < 1.0
    assert metrics["seed"] == 0 and metrics["seconds"] > 0


def test_table_and_progress(finished):
    out, printed = finished
    metrics = json.loads((out / "metrics.json").read_text())
    row = next(line for line in printed.splitlines() if line.startswith("PACL"))
    values = [metrics["pacl"][group][key] for group in ("seen", "held_out") for key in ("miou", "patch_accuracy")]
    assert row.split()[1:] == [f"{100 * value:.1f}" for value in values]
    for label in ("Plain CLIP", "Mean pooling", "Patch-grid limit", "Next:"):
        assert label in printed


def test_picture(finished):
    with Image.open(finished[0] / "segmentation.png") as picture:
        assert picture.format == "PNG" and min(picture.size) >= 500
        picture.load()


def test_the_command_to_type_next_works(finished, tmp_path):
    (line,) = [line for line in finished[1].splitlines() if line.startswith("  pacl look ")]
    assert main([*shlex.split(line)[1:-1], str(tmp_path)]) == 0
    assert len(list(tmp_path.glob("scene-*.png"))) >= 3


def test_no_temporary_files_are_left(finished):
    assert not [path for path in finished[0].rglob("*") if path.name.startswith(".")]


def test_saved_clip_opens_in_open_clip(finished):
    folder = finished[0] / "clip"
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    weights = load_file(folder / "open_clip_model.safetensors")
    assert torch.equal(model.state_dict()["visual.proj"], weights["visual.proj"])
    # A trained text tower tells the classes apart.
    with torch.no_grad():
        texts = model.encode_text(tokenizer()(list(CLASSES)), normalize=True)
    assert torch.linalg.matrix_rank(texts) > 10


def test_saved_embedder(finished, tmp_path):
    """It finds its CLIP after the whole folder has been moved."""
    shutil.copytree(finished[0], tmp_path / "moved", ignore=shutil.ignore_patterns("scenes"))
    towers, embedder = load_pacl(tmp_path / "moved/embedder")
    assert towers.names["model"] == f"local-dir:{tmp_path / 'moved/embedder/../clip'}"
    tokens = towers.tokens(towers.transform(Image.new("RGB", (64, 64)))[None])
    assert embedder(tokens).shape == (1, 64, 128)
    notes = json.loads((finished[0] / "embedder" / "config.json").read_text())["training"]
    assert notes == {"steps": 40, "planned_steps": 40, "seed": 0, "form": "cosine", "attn_temperature": 0.05}


def test_same_seed_same_numbers(finished, tmp_path):
    before = json.loads((finished[0] / "metrics.json").read_text())
    assert start(tmp_path).wait(timeout=120) == 0
    again = json.loads((tmp_path / "metrics.json").read_text())
    assert before | {"seconds": 0} == again | {"seconds": 0}
    for name in ("clip/open_clip_model.safetensors", "embedder/model.safetensors", "segmentation.png"):
        assert (finished[0] / name).read_bytes() == (tmp_path / name).read_bytes()


def interrupt(process: subprocess.Popen, at: str) -> str:
    """Send Ctrl-C when a progress line starts with `at`; returns what the demo printed."""
    for line in process.stderr:
        if line.startswith(at):
            process.send_signal(signal.SIGINT)
            break
    printed, _ = process.communicate(timeout=60)
    return printed


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGINT to a child process")
def test_interrupt_keeps_the_clip_and_leaves_a_complete_run_alone(finished):
    out = finished[0]
    files = ("metrics.json", "segmentation.png", "clip/open_clip_model.safetensors", "embedder/model.safetensors")
    complete = {name: (out / name).read_bytes() for name in files}
    process = start(out, "--clip-steps", "200")
    printed = interrupt(process, "CLIP: 20/200")
    assert process.returncode == 130
    assert "Interrupted. Kept:" in printed and "of 200 steps" in printed
    kept = out / "interrupted"
    steps = json.loads((kept / "clip" / "open_clip_config.json").read_text())["training"]["steps"]
    assert 20 <= steps < 200
    trained = open_clip.create_model(f"local-dir:{kept / 'clip'}").state_dict()
    assert not torch.equal(trained["visual.proj"], load_file(out / "clip/open_clip_model.safetensors")["visual.proj"])
    assert not (kept / "embedder").exists()
    assert {name: (out / name).read_bytes() for name in files} == complete


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGINT to a child process")
def test_interrupt_keeps_the_embedder(tmp_path):
    process = start(tmp_path, "--clip-steps", "2", "--embedder-steps", "2000")
    printed = interrupt(process, "PACL: 200/2000")
    assert process.returncode == 130
    assert "PACL" in printed and "of 2000 steps" in printed
    notes = json.loads((tmp_path / "interrupted/embedder/config.json").read_text())["training"]
    assert 200 <= notes["steps"] < 2000 and notes["planned_steps"] == 2000
    VisionEmbedder.from_pretrained(tmp_path / "interrupted/embedder")
    assert (tmp_path / "interrupted/clip/open_clip_model.safetensors").exists()
    assert not (tmp_path / "metrics.json").exists()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (["--seed", "-1"], "seed: got -1, expected an integer of at least 0"),
        (["--clip_steps", "0"], "clip_steps: got 0, expected an integer of at least 1"),
        (["--seed", "x"], "argument --seed: invalid int value: 'x'"),
    ],
)
def test_bad_arguments(argument, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--out", str(tmp_path), *argument])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_out_must_be_a_folder(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        main(["demo", "--out", str(tmp_path / "file")])
    assert "is a file, expected a folder" in capsys.readouterr().err
    assert main(["demo", "--quick", "--out", str(tmp_path / "file" / "below")]) == 1
    assert "pacl: error:" in capsys.readouterr().err
