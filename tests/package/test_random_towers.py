"""Frozen towers without weights are refused, or kept with the embedder so that it can be loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("open_clip")
pytest.importorskip("tyro")
import torch
from pacl.cli import main
from pacl.sharing import load_pacl
from pacl.training.checkpoints import checkpoints
from safetensors.torch import load_file, save_file
from small_towers import registered, train

torch.set_num_threads(1)


@pytest.fixture
def world(tower_world) -> Path:
    return tower_world


@pytest.fixture
def tiny(tmp_path) -> str:
    return registered(tmp_path)


def features(world: Path, out: Path, *words: str) -> int:
    data = ["--train-data", str(world / "scenes/train-000.tar"), "--out", str(out), "--precision", "fp32"]
    return main(["features", *data, "--workers", "0", "--seed", "3", *words])


def files(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {},
            "pretrained: got none for tiny, so the vision and text towers would be random and stay so; expected a tag",
        ),
        ({"no-lock-image": None}, "pretrained: got none for tiny, so the text tower would be random and stay so"),
        ({"lock-image-unlocked-groups": 1, "no-lock-text": None}, "pretrained: got none for tiny, so the vision tower"),
        (
            {"model": "clip", "vision-model": "test_vit", "no-vision-pretrained": None, "force-image-size": 64},
            "vision_pretrained: got False for test_vit, so the vision tower would be random and stay so; expected True",
        ),
        ({"dry-run": None}, "pretrained: got none for tiny"),
    ],
    ids=["both", "text", "partly", "timm", "dry-run"],
)
def test_random_frozen_towers_are_refused(changes, message, world, tiny, tmp_path, capsys):
    changes = {"model": tiny} | changes
    if changes["model"] == "clip":
        changes["model"] = f"local-dir:{world / 'clip'}"
    assert train(world, tmp_path / "logs", **changes) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"pacl: error: {message}") and error.endswith(", or --random-towers to use and keep them\n")
    assert not (tmp_path / "logs/pacl").exists()


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "changes, kept, trained",
    [
        ({}, ["visual", "text"], []),
        ({"no-lock-image": None, "tower-lr": 0.01}, ["text"], ["visual"]),
        ({"lock-image-unlocked-groups": 1}, ["text"], ["visual"]),
        ({"vision-model": "test_vit", "no-vision-pretrained": None, "force-image-size": 64}, ["visual"], []),
    ],
    ids=["both", "text", "partly", "timm"],
)
def test_random_towers_are_kept(changes, kept, trained, world, tiny, tmp_path):
    changes = {"model": tiny, "random-towers": None, "max-steps": 2} | changes
    if "vision-model" in changes:
        changes["model"] = f"local-dir:{world / 'clip'}"
    assert train(world, tmp_path / "logs", **changes) == 0
    torch.manual_seed(5)
    folder = tmp_path / "logs/pacl/embedder"
    first = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    towers, embedder = load_pacl(folder)  # which compares the fingerprint
    assert embedder.towers["random"] == kept and embedder.towers["trained"] == trained
    assert files(folder) == {"model", *kept, *trained}
    assert embedder(towers.tokens(towers.probe()[0])).isfinite().all()

    last = checkpoints(tmp_path / "logs/pacl/checkpoints")[-1]
    assert train(world, tmp_path / "logs", **changes | {"max-steps": 3, "resume": "latest"}) == 0
    assert checkpoints(tmp_path / "logs/pacl/checkpoints")[-1] != last
    load_pacl(folder)
    assert all((folder / f"{name}.safetensors").read_bytes() == first[f"{name}.safetensors"] for name in kept)


def test_towers_trained_from_scratch_need_no_flag(world, tiny, tmp_path):
    changes = {"model": tiny, "no-lock-image": None, "no-lock-text": None, "max-steps": 1}
    assert train(world, tmp_path / "logs", **changes) == 0
    _, embedder = load_pacl(tmp_path / "logs/pacl/embedder")
    assert embedder.towers["trained"] == ["visual", "text"] and "random" not in embedder.towers


def test_features_of_random_towers(world, tiny, tmp_path, capsys):
    assert features(world, tmp_path / "features", "--model", tiny) == 1
    assert "pretrained: got none for tiny, so the vision and text towers would be random" in capsys.readouterr().err
    assert features(world, tmp_path / "features", "--model", tiny, "--random-towers") == 0
    manifest = json.loads((tmp_path / "features/manifest.json").read_text())
    assert manifest["towers"]["random"] == ["visual", "text"] and manifest["plan"]["random_towers"]
    assert {"visual", "text"} < files(tmp_path / "features")
    changes = {"train-data": "None", "features": tmp_path / "features", "model": tiny, "seed": 11, "max-steps": 1}
    assert train(world, tmp_path / "logs", **changes) == 0
    _, embedder = load_pacl(tmp_path / "logs/pacl/embedder")
    assert embedder.towers["fingerprint"] == manifest["towers"]["fingerprint"]


def test_features_continue_with_the_towers_that_were_kept(world, tiny, tmp_path):
    """Another version of PyTorch may draw other weights; they would not fit the finished shards."""
    out = tmp_path / "features"
    assert features(world, out, "--model", tiny, "--random-towers") == 0
    manifest = json.loads((out / "manifest.json").read_text())
    other = load_file(out / "visual.safetensors")
    save_file({name: x * 1.5 for name, x in other.items()}, out / "visual.safetensors")
    (out / "features-00000.safetensors").unlink()
    (out / "manifest.json").write_text(json.dumps(manifest | {"complete": False, "shards": []}))
    assert features(world, out, "--model", tiny, "--random-towers") == 0
    found, before = (x["towers"]["fingerprint"] for x in (json.loads((out / "manifest.json").read_text()), manifest))
    assert found["visual"] != before["visual"] and found["text"] == before["text"]
    changes = {"train-data": "None", "features": out, "model": tiny, "max-steps": 1}
    assert train(world, tmp_path / "logs", **changes) == 0
