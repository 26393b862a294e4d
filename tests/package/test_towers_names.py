"""Wrong and malicious names of towers, on the command line and in an embedder's folder, are refused."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from pacl import sharing
from pacl.cli import main
from pacl.sharing import _absolute, load_pacl
from small_towers import registered, train

torch.set_num_threads(1)


@pytest.fixture
def world(tower_world) -> Path:
    return tower_world


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": "ViT-B-61"}, "model: got 'ViT-B-61', expected a model of open_clip, such as ViT-B-16"),
        (
            {"model": "ViT-B-32", "pretrained": "opnai"},
            "pretrained: got 'opnai', expected a file or a tag of ViT-B-32, such as openai",
        ),
        ({"pretrained": "openai"}, "which has its own weights"),
        (
            {"vision-model": "vit_bas_patch16_224"},
            "vision_model: got 'vit_bas_patch16_224', expected a model of timm, such as vit_base",
        ),
        (
            {"vision-model": "vit_base_patch16_224.dinno"},
            "for which timm has no weights; expected a name such as vit_base_patch16_224.dino",
        ),
        (
            {"vision-model": "resnet10t", "no-vision-pretrained": None, "force-image-size": -3},
            "force_image_size: got -3",
        ),
        ({"vision-model": "test_byobnet", "no-vision-pretrained": None}, "visual: got ByobNet, expected"),
        (
            {"vision-model": "test_vit", "no-vision-pretrained": None, "force-image-size": 50},
            "force_image_size: got 50, expected a multiple of 16",
        ),
        ({"lock-image-unlocked-groups": 4}, "lock_image_unlocked_groups: got 4, expected at most the 3 blocks"),
        (
            {"lock-image-unlocked-groups": 1, "no-lock-image": None},
            "lock_image_unlocked_groups: got 1 with no_lock_image",
        ),
        ({"grad-checkpointing": None}, "grad_checkpointing: got True, expected a tower to train"),
        ({"tower-lr": 1e-5}, "tower_lr: got 1e-05, expected a tower to train"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_wrong_names_are_one_line(changes, message, world, tmp_path, capsys):
    assert train(world, tmp_path, **changes) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("pacl: error: ") and message in error


class Malicious:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


@pytest.mark.parametrize("how", ["pretrained", "folder", "zip"])
def test_nothing_is_unpickled(how, world, tmp_path, capsys, monkeypatch):
    """A pickle as weights, in a file or in a model's folder, is refused and not executed."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(world / "clip", "clip")
    if how == "folder":
        Path("clip/open_clip_model.safetensors").unlink()
        torch.save({"state_dict": Malicious()}, "clip/open_clip_pytorch_model.bin")
        assert train(world, tmp_path, model="local-dir:clip") == 1
    else:
        torch.save(Malicious(), "weights.pt") if how == "zip" else Path("weights.pt").write_bytes(
            pickle.dumps(Malicious())
        )
        assert train(world, tmp_path, model=registered(tmp_path), pretrained="weights.pt") == 1
        error = capsys.readouterr().err
        assert "pretrained: got 'weights.pt' for tiny, which holds other objects than tensors" in error
    assert not Path("executed").exists(), "something was executed"


@pytest.mark.parametrize(
    "content, message",
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "which is a pointer of Git LFS"),
        (b"<!DOCTYPE html>\n", "which is a page of HTML"),
        (b"", "which is an empty file"),
        (b"hello", "which is a text, expected weights"),
        (b"\0" * 99, "which holds other objects than tensors or is damaged"),
        ({}, "which holds no tensors, expected those of the model"),
        (
            {"vision_model.norm.weight": torch.zeros(8)},
            "does not fit the model: it lacks logit_scale, visual.class_embedding, visual.positional_embedding, ... "
            "(62 in all); it has vision_model.norm.weight, which the model does not have",
        ),
    ],
)
def test_files_that_are_no_weights_of_the_model(content, message, world, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("weights.pt").write_bytes(content) if isinstance(content, bytes) else torch.save(content, "weights.pt")
    assert train(world, tmp_path, model=registered(tmp_path), pretrained="weights.pt") == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pacl: error: ")]
    assert line.startswith("pacl: error: pretrained: got 'weights.pt' for tiny, ") and message in line


@pytest.mark.parametrize(
    "name", ["logs/rnu/embedder", "./x", "../x/y", "logs/rnu", "missing", "/no/such", "~/logs", "a b/c"]
)
def test_a_mistyped_folder_is_no_name_on_the_hub(name, tmp_path, capsys, monkeypatch):
    """A mistyped folder is an error, without a request to the Hub."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "logs").mkdir()
    monkeypatch.setattr(sharing, "snapshot_download", lambda name, **options: pytest.fail(f"asked for {name}"))
    assert main(["evaluate", "retrieval", "--data", "synthetic:eval", "--scenes", "4", "--checkpoint", name]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"pacl: error: folder: got {name!r}, which does not exist; expected a folder, or a name")
    assert said.count("\n") == 1


def test_a_name_on_the_hub_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []

    def download(name, **options):
        asked.append((name, options["revision"]))
        raise OSError("no network")

    monkeypatch.setattr(sharing, "snapshot_download", download)
    with pytest.raises(OSError, match="no network"):
        load_pacl("owner/some-name_1.0", revision="main")
    assert asked == [("owner/some-name_1.0", "main")]


def test_a_folder_from_the_hub_names_nothing_outside_itself(world, tmp_path):
    shutil.copytree(world / "clip", tmp_path / "clip")
    folder = tmp_path / "embedder"
    folder.mkdir()
    for name in ("local-dir:../clip", "../clip/open_clip_model.safetensors"):
        assert _absolute(name, folder, trusted=True).endswith(str(folder / name.removeprefix("local-dir:")))
        with pytest.raises(ValueError, match="names .*, which is outside of it"):
            _absolute(name, folder, trusted=False)
    assert _absolute("openai", folder, trusted=False) == "openai"
