"""An embedder's fingerprint of its towers accepts the same towers and rejects others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from pacl.embedder import VisionEmbedder, save_embedder
from pacl.sharing import check_towers, describe_towers, load_pacl
from pacl.towers import load_towers
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def world(tower_world) -> Path:
    return tower_world


def change_config(folder: Path, **changes) -> None:
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    for name, value in changes.items():
        config["model_cfg" if name == "quick_gelu" else "preprocess_cfg"][name] = value
    path.write_text(json.dumps(config))


@pytest.fixture(scope="module")
def shared(world, tmp_path_factory) -> Path:
    """Create a CLIP with QuickGELU and, in the same folder, an embedder on it."""
    folder = tmp_path_factory.mktemp("shared")
    shutil.copytree(world / "clip", folder / "clip")
    change_config(folder / "clip", quick_gelu=True)
    towers = describe_towers(load_towers(f"local-dir:{folder / 'clip'}"), folder / "embedder")
    save_embedder(VisionEmbedder(64, 48), folder / "embedder", towers)
    return folder


@pytest.fixture
def moved(shared, tmp_path) -> Path:
    shutil.copytree(shared, tmp_path / "moved")
    return tmp_path / "moved"


def test_the_fingerprint_is_a_few_dozen_numbers(shared):
    towers = json.loads((shared / "embedder/config.json").read_text())["towers"]
    assert towers["activation"] == {"visual": "QuickGELU", "text": "QuickGELU"} and towers["image_size"] == [64, 64]
    for name, count in (("visual", 48), ("text", 24)):
        numbers = towers["fingerprint"][name]
        assert len(numbers) == len(set(numbers)) == count and all(isinstance(x, float) for x in numbers)
        assert np.isfinite(numbers).all()


def test_the_same_towers_are_accepted_also_as_bfloat16(moved, monkeypatch):
    monkeypatch.chdir(moved)
    for folder in (moved / "embedder", "embedder"):
        towers, embedder = load_pacl(folder)
    for part in (towers.visual, towers.text):
        part.bfloat16()
    check_towers(embedder.towers, towers)


def test_a_lost_quick_gelu_is_caught(moved):
    change_config(moved / "clip", quick_gelu=False)
    with pytest.raises(ValueError, match="the vision tower's activation is GELU, not QuickGELU; .*text tower's activ"):
        load_pacl(moved / "embedder")


def test_another_activation_of_the_same_name_is_caught_by_the_numbers(moved):
    towers, embedder = load_pacl(moved / "embedder")
    for block in towers.visual.transformer.resblocks:
        block.mlp.gelu.forward = torch.nn.functional.gelu
    with pytest.raises(ValueError, match="trained on, but the vision tower's output is off by"):
        check_towers(embedder.towers, towers)


@pytest.mark.parametrize("part, label", [("visual.transformer.resblocks.1.", "vision"), ("ln_final.", "text")])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_other_weights_are_caught(part, label, precision, moved):
    path = moved / "clip/open_clip_model.safetensors"
    generator = torch.Generator().manual_seed(1)
    state = load_file(path)
    for name, x in state.items():
        if name.startswith(part):
            x += x.std().nan_to_num(1).clamp(min=0.1) * torch.randn(x.shape, generator=generator)
    save_file(state, path)
    towers, embedder = load_towers(f"local-dir:{moved / 'clip'}"), VisionEmbedder.from_pretrained(moved / "embedder")
    for tower in (towers.visual, towers.text):
        tower.to(precision)
    with pytest.raises(ValueError, match=f"trained on, but the {label} tower's output is off by"):
        check_towers(embedder.towers, towers)


@pytest.mark.parametrize(
    "changes, message",
    [({"mean": [0.5, 0.5, 0.5]}, "vision tower's output"), ({"resize_mode": "squash"}, "vision tower's output")],
)
def test_another_preprocessing_is_caught(changes, message, moved):
    change_config(moved / "clip", **changes)
    with pytest.raises(ValueError, match=message):
        load_pacl(moved / "embedder")


def test_another_size_and_other_names_are_told(moved, world):
    embedder = VisionEmbedder.from_pretrained(moved / "embedder")
    towers = load_towers(f"local-dir:{moved / 'clip'}", vision_model="test_resnet", vision_pretrained=False)
    with pytest.raises(ValueError, match=r"pixels, not \[64, 64\]; they are .*clip \(no tag\) with test_resnet, not"):
        check_towers(embedder.towers, towers)


def test_an_embedder_without_towers_is_an_error(tmp_path):
    save_embedder(VisionEmbedder(6, 4), tmp_path)
    with pytest.raises(ValueError, match="config.json does not describe the towers of the embedder"):
        load_pacl(tmp_path)
