"""Errors of files that are not what they should be: one sentence with the file, what it is and what was expected."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest

pytest.importorskip("open_clip")
pytest.importorskip("tyro")
import torch
from pacl import load_pacl
from pacl.cli import main
from pacl.embedder import VisionEmbedder
from safetensors.torch import load_file, save_file

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 598641023\n"
HTML = b"<!DOCTYPE html>\n<html></html>\n"
POINTER = "is a pointer of Git LFS, in place of the file itself (git lfs pull fetches it)"
FOREIGN = ("Errno", "Error", "torch.Size", "weights_only", "Traceback", "None", " , ", ": ,", "\n")  # of other people


def error_of(argv, capsys) -> str:
    """Run a command that fails, and return its line after "pacl: error: "."""
    assert main([str(word) for word in argv]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pacl: error: ")]
    assert not [word for word in FOREIGN if word in line], line
    return line.removeprefix("pacl: error: ")


def evaluate(*flags):
    return ["evaluate", "retrieval", "--data", "synthetic:eval", "--scenes", "2", "--workers", "0", *flags]


def train(world, logs, *flags):
    data = ["--train-data", world / "scenes/train-000.tar", "--model", f"local-dir:{world / 'clip'}"]
    return ["train", *data, "--log-dir", logs, "--batch-size", "4", "--max-steps", "1", "--workers", "0", *flags]


def fewer(weights):
    return {name: x for name, x in weights.items() if "ln_post" not in name}


def smaller(weights):
    return weights | {"visual.proj": torch.zeros(2, 3)}


@pytest.mark.parametrize(
    "change, message",
    [
        (LFS, f"open_clip_model.safetensors {POINTER}, expected weights"),
        (HTML, "open_clip_model.safetensors is a page of HTML, in place of the file itself"),
        (b"hello\n", "open_clip_model.safetensors is a text, expected weights"),
        (fewer, "does not fit the model: it lacks visual.ln_post.weight, visual.ln_post.bias"),
        (smaller, "visual.proj has the shape [2, 3], expected [128, 128]"),
        ("open_clip_model.safetensors", "has no weights (*.safetensors, *.bin, *.pth)"),
        ("open_clip_config.json", "has no open_clip_config.json; expected a model's folder"),
        ({"model_cfg": {"embed_dim": 128, "other": 3}}, "whose settings describe no model that this version makes"),
        ({}, "open_clip_config.json has no 'model_cfg'"),
    ],
    ids=["LFS", "HTML", "text", "fewer", "smaller", "no weights", "no config", "other config", "no model_cfg"],
)
def test_a_local_model(change, message, untrained, tmp_path, capsys):
    """A folder with another file as weights, other weights, no weights, which would be random, or other settings."""
    folder = shutil.copytree(untrained / "clip", tmp_path / "clip")
    weights = folder / "open_clip_model.safetensors"
    if isinstance(change, str):
        (folder / change).unlink()
    elif isinstance(change, bytes):
        weights.write_bytes(change)
    elif isinstance(change, dict):
        (folder / "open_clip_config.json").write_text(json.dumps(change))
    else:
        save_file(change(load_file(untrained / "clip" / weights.name)), weights)
    line = error_of(evaluate("--model", f"local-dir:{folder}"), capsys)
    assert line.startswith(f"model: got 'local-dir:{folder}'") and message in line


def test_a_local_vision_tower(run_world, tmp_path, capsys):
    folder = tmp_path / "tower"
    flags = ["--dry-run", "--vision-model", f"local-dir:{folder}"]
    got = f"vision_model: got 'local-dir:{folder}'"
    assert error_of(train(run_world, tmp_path, *flags), capsys).startswith(f"{got}, but {folder} is not a folder")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architecture": "test_vit"}))
    (folder / "model.safetensors").write_bytes(LFS)
    assert f"{got}, whose model.safetensors {POINTER}" in error_of(train(run_world, tmp_path, *flags), capsys)
    save_file({"other": torch.zeros(2)}, folder / "model.safetensors")
    line = error_of(train(run_world, tmp_path, *flags), capsys)
    assert f"{got}, whose model.safetensors does not fit the model: it lacks cls_token, pos_embed, " in line
    assert " in all); it has other, which the model does not have" in line


@pytest.mark.parametrize(
    "header, message",
    [
        ("filepath;title", "its first line is filepath;title; give --csv-separator ';'"),
        ("image;caption", "its first line is image;caption, with ';' between columns? (--csv-separator)"),
        ("image,caption", "it has the columns image, caption"),
        (",,", "its first line names no column"),
        (LFS.decode(), f"it {POINTER}"),
        ("", "it is an empty file"),
    ],
)
def test_the_columns_of_a_csv(header, message, tmp_path, capsys):
    path = tmp_path / "pairs.csv"
    path.write_text(f"{header}\n" if header else "")
    line = error_of(["data", "check", path], capsys)
    wanted = "csv_img_key, csv_caption_key: got 'filepath' and 'title', expected columns of"
    assert line == f"{wanted} {path}, but {message}"


def test_pointers_in_place_of_data(run_world, tmp_path, capsys):
    (tmp_path / "captions.json").write_bytes(LFS)
    assert f"captions.json {POINTER}, expected `images`" in error_of(
        ["data", "check", tmp_path / "captions.json"], capsys
    )
    shard, folder = tmp_path / "a.tar", tmp_path / "pairs"
    shard.write_bytes(LFS)
    assert main(["data", "pack", str(shard), "--out", str(tmp_path / "out")]) == 1
    assert f"bad: {shard}: archive: it {POINTER}" in capsys.readouterr().out
    line = error_of([*train(run_world, tmp_path), "--train-data", shard], capsys)
    assert line == "train_data: got no pairs in 1 shard(s); `pacl data check` says why"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(LFS)
    (folder / "a.txt").write_text("a dog")
    assert main(["data", "pack", str(folder), "--out", str(tmp_path / "out")]) == 1
    assert "bad: a.jpg: format: got a pointer of Git LFS, which is not read" in capsys.readouterr().out


@pytest.mark.skipif(importlib.util.find_spec("transformers") is not None, reason="transformers is installed")
@pytest.mark.parametrize("model", ["ViT-B-16-SigLIP", "roberta-ViT-B-32"])
def test_a_tokenizer_that_needs_a_package(model, capsys):
    line = error_of(["data", "check", "synthetic", "--scenes", "2", "--model", model], capsys)
    assert (
        line == f"model: got the tokenizer of {model}, which needs the package transformers: pip install transformers"
    )


def test_the_folder_of_a_run_is_a_checkpoint(untrained, tmp_path, capsys):
    run, out = untrained / "run", tmp_path / "out"
    assert main([*evaluate("--checkpoint", str(run), "--out", str(out))]) == 0
    assert [path.name for path in out.iterdir()] == ["synthetic-eval_clip_run_retrieval-phi.json"]
    for one in (load_pacl(run)[1], VisionEmbedder.from_pretrained(run)):
        other = load_pacl(run / "embedder")[1].state_dict()
        assert all(torch.equal(x, other[name]) for name, x in one.state_dict().items())
    config = "the folder of an embedder, with config.json, or that of a run, with embedder/config.json"
    line = error_of(evaluate("--checkpoint", tmp_path), capsys)
    assert line == f"folder: got '{tmp_path}', expected {config}"
    (tmp_path / "config.yaml").write_text("name: pacl\n")
    line = error_of(evaluate("--checkpoint", tmp_path), capsys)
    assert line == f"folder: got '{tmp_path}', whose run has saved no embedder yet, expected {config}"
    line = error_of(evaluate("--checkpoint", run / "embedder/model.safetensors"), capsys)
    assert line.endswith("which is a file; expected the folder of an embedder or of a run")


@pytest.mark.parametrize(
    "content, message",
    [
        (LFS, f"{POINTER}, expected a checkpoint of pacl train"),
        (b"hello\n", "is a text, expected a checkpoint of pacl train"),
        ({"weight": torch.zeros(2)}, "has no data, global_batch, optimizer, state_dict, step, world, expected a"),
        (None, "does not exist, expected latest or a checkpoint such as checkpoints/step_00001000.pt"),
        ("folder", "is a folder, expected latest or a checkpoint"),
    ],
    ids=str,
)
def test_a_file_to_resume_from(content, message, run_world, tmp_path, capsys):
    path = tmp_path / "step.pt"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    line = error_of(train(run_world, tmp_path, "--resume", path), capsys)
    assert line.startswith(f"resume: {path} {message}")


def test_resuming_without_a_checkpoint_is_said(run_world, tmp_path, capsys):
    flags = ["--resume", "latest", "--report-to", "none"]
    told = f"resume: {tmp_path / 'pacl/checkpoints'} has no checkpoint, so the run starts from step 0"
    for end in (["--dry-run"], []):
        assert main([str(word) for word in train(run_world, tmp_path, *flags, *end)]) == 0
        assert told in capsys.readouterr().out.splitlines()
    assert main([str(word) for word in [*train(run_world, tmp_path, *flags), "--dry-run"]]) == 0
    assert told not in capsys.readouterr().out


def test_files_that_the_system_cannot_open(untrained, tmp_path, capsys):
    model, missing = ["--model", f"local-dir:{untrained / 'clip'}"], tmp_path / "missing"
    assert error_of(["train", "--config", missing], capsys) == f"{missing} does not exist"
    assert error_of(["evaluate", "table", tmp_path], capsys) == f"{tmp_path} is a folder, expected a file"
    (tmp_path / "file").write_bytes(b"")
    line = error_of(["data", "pack", "synthetic", "--scenes", "2", "--out", tmp_path / "file"], capsys)
    assert line == f"{tmp_path / 'file'} exists and is a file, expected a folder"
    line = error_of(["data", "pack", "synthetic", "--scenes", "2", "--out", tmp_path / "file/out"], capsys)
    assert line == f"{tmp_path / 'file/out'} is not below a folder: a part of this path is a file"
    assert error_of(evaluate(*model, "--device", "gpu"), capsys).startswith(
        "device: got 'gpu', expected auto, cpu, cuda"
    )
    assert error_of(evaluate(*model, "--device", "meta"), capsys).startswith(
        "device: got 'meta', which holds no numbers, expected auto, cpu, cuda"
    )
    line = error_of(evaluate(*model, "--device", "vulkan"), capsys)
    assert line == "device: got 'vulkan', which this PyTorch cannot use; expected one that is there, auto or cpu"
    if not torch.cuda.is_available():
        line = error_of(evaluate(*model, "--device", "cuda"), capsys)
        assert line == "device: got 'cuda', but PyTorch finds no GPU; expected one that is there, auto or cpu"


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="this user may open every file")
def test_a_file_of_another_user(tmp_path, capsys):
    (tmp_path / "config.yaml").touch(mode=0)
    assert error_of(["train", "--config", tmp_path / "config.yaml"], capsys).endswith("may not be opened by this user")


def test_errors_of_the_hub_name_the_cause(tmp_path, monkeypatch, capsys):
    """Without a network, or offline by HF_HUB_OFFLINE, nothing is asked for and an earlier download is missing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = error_of(evaluate("--checkpoint", "owner/name"), capsys)
    assert line.startswith("folder: got 'owner/name', which could not be downloaded: ")
    assert line.endswith(" and no earlier download is on this machine") and Path.cwd() == tmp_path
