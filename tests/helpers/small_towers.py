"""A CLIP of a few layers with scenes, runs of `pacl train` on it, and a NaFlex ViT of two layers."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import open_clip
import timm
import torch
from pacl.backbones import freeze
from pacl.cli import main
from pacl.data import scenes
from pacl.data.scene_shards import write_scenes
from safetensors.torch import save_file
from torch import nn

SIZES = {
    "embed_dim": 48,
    "vision_cfg": {"image_size": 64, "patch_size": 8, "width": 64, "layers": 3, "head_width": 32},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}

NAFLEX = {"embed_dim": 32, "depth": 2, "num_heads": 2}  # patches of 16 pixels


def write_world(
    folder: Path, train: tuple[int, int] = (24, 24), evaluation: tuple[int, int] = (0, 1), sizes: dict = SIZES
) -> Path:
    """Write an untrained CLIP, and scenes to train on and to validate on: their number, and the most of a shard."""
    torch.manual_seed(0)
    (folder / "clip").mkdir(parents=True)
    (folder / "clip/open_clip_config.json").write_text(json.dumps({"model_cfg": sizes, "preprocess_cfg": {}}))
    save_file(open_clip.CLIP(**copy.deepcopy(sizes)).state_dict(), folder / "clip/open_clip_model.safetensors")
    write_scenes(folder / "scenes", "train", train[0], seed=0, pairs=scenes.SEEN, shard_size=train[1])
    write_scenes(folder / "scenes", "eval", evaluation[0], seed=0, shard_size=evaluation[1])
    return folder


def train(world: Path, logs: Path, **changes) -> int:
    values = {
        "train-data": world / "scenes/train-000.tar",
        "model": f"local-dir:{world / 'clip'}",
        "log-dir": logs,
        "batch-size": 8,
        "max-steps": 4,
        "workers": 0,
        "report-to": "none",
    }
    words = [
        x for name, value in (values | changes).items() for x in ([f"--{name}"] + [str(value)] * (value is not None))
    ]
    return main(["train", *words])


def registered(folder: Path) -> str:
    """Register SIZES with open_clip, and return the name."""
    (folder / "tiny.json").write_text(json.dumps(SIZES))
    open_clip.add_model_config(folder / "tiny.json")
    return "tiny"


def naflex(name: str = "naflexvit_base_patch16_gap", **options) -> nn.Module:
    torch.manual_seed(0)
    visual = timm.create_model(name, **NAFLEX, num_classes=0, **options)
    with torch.no_grad():  # fresh blocks and positions are almost nothing, and wrong ones would make no difference
        for each, x in visual.named_parameters():
            if "pos_embed" in each:
                x.normal_()
            elif "blocks" in each and x.ndim > 1:
                x.normal_(0, 0.2)
            elif each.endswith("gamma"):
                x.fill_(1)
    return freeze(visual)


def save_naflex(folder: Path) -> None:
    """Write the tower of `naflex()` for `--vision-model local-dir:FOLDER`."""
    folder.mkdir(parents=True)
    config = {"architecture": "naflexvit_base_patch16_gap", "num_classes": 0, "model_args": NAFLEX}
    (folder / "config.json").write_text(json.dumps(config | {"pretrained_cfg": {}}))
    save_file(naflex().state_dict(), folder / "model.safetensors")
