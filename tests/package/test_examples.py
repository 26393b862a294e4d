"""The examples run from any folder, do what they say, use public names only, and explain a wrong argument."""

from __future__ import annotations

import ast
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pacl
import pytest

import pacl_kernels

pytest.importorskip("open_clip")
import timm
import torch
from forks import run_ranks, run_script
from pacl.data.scenes import CLASSES
from pictures import picture
from PIL import Image
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
RECIPES = sorted((ROOT / "examples" / "recipes").rglob("*.py"))
PUBLIC = {"pacl": pacl.__all__, "pacl_kernels": pacl_kernels.__all__}

torch.set_num_threads(1)


def run(folder: Path, name: str, *words) -> str:
    """Run an example in `folder`, which is not the repository's, and return its output."""
    status, printed = run_script([ROOT / "examples" / name, *words], folder / "printed", folder)
    assert status == 0, printed[-4000:]
    return printed


def losses(printed: str) -> list[float]:
    return [float(value) for value in re.findall(r"loss ([\d.]+)$", printed, re.MULTILINE)]


@pytest.fixture
def data(run_world) -> list[str]:
    shards = sorted((run_world / "scenes").glob("train-*.tar"))
    return [*map(str, shards), "--model", f"local-dir:{run_world / 'clip'}"]


def test_train_loop_learns(data, tmp_path):
    found = losses(run(tmp_path, "train_loop.py", *data, "--steps", 60, "--batch-size", 16))
    assert len(found) == 4 and found[0] > np.log(16) and found[-1] < 0.7 * found[0]


def test_ddp_has_the_losses_of_one_process(data, tmp_path, monkeypatch, capsys):
    options = [*data, "--epochs", "3", "--batch-size", "18", "--pairs", "100"]
    status, printed = run_ranks([ROOT / "examples" / "ddp.py", *options], 2, tmp_path / "printed")
    assert status == 0, printed[-4000:]
    torchrun = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in torchrun.items():  # this process, because starting another takes seconds
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [str(ROOT / "examples" / "ddp.py"), *options])
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    one = losses(capsys.readouterr().out)
    assert len(one) == 3 and one[-1] < 0.9 * one[0]
    assert losses(printed) == pytest.approx(one, rel=1e-5)


def test_segment_photo_writes_the_labels(untrained, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter, as phones store photos
    Image.fromarray(picture(1, 48, 80)).save(tmp_path / "photo.png", exif=exif)
    checkpoint, words = untrained / "run/embedder", [*CLASSES[:8], "dog, puppy"]
    printed = run(tmp_path, "segment_photo.py", "photo.png", *words, "--checkpoint", checkpoint, "--out", "a/b")

    upright = Image.fromarray(picture(1, 48, 80)).transpose(Image.Transpose.ROTATE_270)
    expected = pacl.Segmenter(*pacl.load_pacl(checkpoint), stride=2).labels(upright, words).numpy()
    labels = np.asarray(Image.open(tmp_path / "a/b/labels.png"))
    assert labels.shape == (80, 48) and len(np.unique(labels)) > 1
    np.testing.assert_array_equal(labels, expected)
    shares = re.findall(r"^(.+): ([\d.]+)% of the pixels$", printed, re.MULTILINE)
    counts = np.bincount(labels.ravel(), minlength=len(words)) / labels.size
    assert [word for word, _ in shares] == words
    assert [float(share) for _, share in shares] == pytest.approx(100 * counts, abs=0.06)
    drawn = np.asarray(Image.open(tmp_path / "a/b/overlay.png")).astype(int)
    painted = 0.4 * np.asarray(upright) + 0.6 * pacl.word_colours(len(words))[labels]
    assert np.abs(drawn - painted).max() <= 1


def test_local_towers_trains_on_the_files_it_got(run_world, tmp_path):
    torch.manual_seed(1)
    weights = timm.create_model("test_vit").state_dict()
    save_file(weights, tmp_path / "weights.safetensors")
    towers = [run_world / "clip", "test_vit", "weights.safetensors", "--out", "out"]
    data = ["--train-data", run_world / "scenes/train-000.tar", "--batch-size", 4, "--max-steps", 1]
    printed = run(tmp_path, "local_towers.py", *towers, *data, "--workers", 0, "--report-to", "none")
    assert "vision tower: local-dir:../../vision, tokens of 64 numbers\n" in printed
    assert "clip, embeddings of 128 numbers\n" in printed
    towers, embedder = pacl.load_pacl(tmp_path / "out/pacl/embedder")
    vision, text = towers.visual.state_dict(), load_file(run_world / "clip/open_clip_model.safetensors")
    assert len(vision) == len(weights) - 2 and all(torch.equal(x, weights[name]) for name, x in vision.items())
    assert torch.equal(towers.text.state_dict()["text_projection"], text["text_projection"])
    assert embedder.config["in_dim"] == 64 and embedder.notes["steps"] == 1


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train_loop.py", "the following arguments are required: shards, --model"),
        ("train_loop.py no.tar --model {clip}", "shards: got no.tar, which is not a file; expected tar files"),
        ("train_loop.py {shard} --model ViT-B-16", "--model: got ViT-B-16 without --pretrained, expected local-dir:"),
        ("train_loop.py {shard} --model local-dir:no", "--model: got local-dir:no without --pretrained, expected"),
        ("train_loop.py {shard} --model {folder}", "without --pretrained, expected local-dir: and a folder"),
        ("ddp.py no.tar --model {clip}", "shards: got no.tar, which is not a file; expected tar files"),
        ("ddp.py {shard} --model local-dir:no", "--model: got local-dir:no without --pretrained, expected local-dir:"),
        ("ddp.py {shard} --model {clip}", "expected torchrun to start this file"),
        ("segment_photo.py no.jpg dog --checkpoint no", "image: got no.jpg, expected an image that Pillow can read"),
        ("segment_photo.py {shard} dog --checkpoint no", "expected an image that Pillow can read"),
        ("segment_photo.py photo.png dog --checkpoint no", "--checkpoint: folder: got 'no', which does not exist"),
        ("local_towers.py no test_vit no", "clip: got no, expected a folder with open_clip_config.json"),
        ("local_towers.py {folder} test_vitt no", "timm_model: got test_vitt, expected a model of timm such as"),
        ("local_towers.py {folder} test_vit no", "checkpoint: got no, which is not a file"),
    ],
)
def test_wrong_arguments_are_one_line(command, message, run_world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(picture(1)).save("photo.png")
    places = {"clip": f"local-dir:{run_world / 'clip'}", "folder": run_world / "clip"}
    words = command.format(shard=run_world / "scenes/train-000.tar", **places).split()
    for name in ("HF_HUB_OFFLINE", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")  # so that what the example sets is undone
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "argv", [str(ROOT / "examples" / words[0]), *words[1:]])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(sys.argv[0], run_name="__main__")
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"{words[0]}: error: ") and message in error


def private_names(tree: ast.AST) -> list[str]:
    """Return the names in a file that are not public: of our packages, all but those in `__all__`."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            found += [name for name in names if name.partition(".")[0] in PUBLIC or "._" in name]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            public = [f"{node.module}.{name}" for name in PUBLIC.get(node.module, [])]
            ours = (node.module or "").partition(".")[0] in PUBLIC
            found += [name for name in names if name not in public and (ours or "._" in name)]
        elif isinstance(node, ast.Attribute) and re.match("_[^_]", node.attr):
            found.append(node.attr)
    return found


@pytest.mark.parametrize("path", EXAMPLES + RECIPES, ids=lambda path: path.name)
def test_examples_use_public_names(path):
    assert not private_names(ast.parse(path.read_text()))


def test_private_names_are_found():
    private = "import pacl.towers, os._x\nfrom pacl.segment.predict import Segmenter\nfrom timm.models._hub import x\n"
    private += "from pacl import towers\nfrom pacl_kernels.loss import fused_pacl_loss\nx = y._z"
    assert len(private_names(ast.parse(private))) == 7
    public = "import timm.models\nfrom pacl import Segmenter\nfrom pacl_kernels import __version__, PaclLoss\nx.__len__"
    assert not private_names(ast.parse(public))


def test_the_readme_names_every_example_and_its_command():
    text = (ROOT / "examples" / "README.md").read_text()
    assert len(EXAMPLES) == 4
    for path in EXAMPLES:
        assert f"[`{path.name}`]({path.name})" in text and f" examples/{path.name} " in text, path.name
