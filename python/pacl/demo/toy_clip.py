"""A CLIP small enough to train from scratch in minutes on one core; open_clip's classes and file names throughout."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save
from torch import Tensor

from ..files import write_bytes

# open_clip's own config format, so that `open_clip.create_model("local-dir:...")` reads what save_clip writes.
CONFIG = {
    "model_cfg": {
        "embed_dim": 128,
        # The class token, not a mean over patches: pooled by a mean, the patches would learn to segment by themselves.
        # Half of the patches are dropped in training: 190 instead of 300 ms a step, for 44 instead of 47 % mIoU.
        "vision_cfg": {
            "image_size": 64,
            "patch_size": 8,
            "width": 128,
            "layers": 3,
            "head_width": 32,
            "patch_dropout": 0.5,
        },
        # One layer: two are slower, and PACL came to 52 % mIoU on seen pairs in 1,500 steps, to 58 in 1,000 with one.
        "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 1},
    },
    "preprocess_cfg": {"mean": list(open_clip.OPENAI_DATASET_MEAN), "std": list(open_clip.OPENAI_DATASET_STD)},
}


def new_clip() -> open_clip.CLIP:
    """An untrained open_clip.CLIP of that config: patches of 8 pixels, 3 + 1 layers, width 128."""
    model = open_clip.CLIP(**copy.deepcopy(CONFIG["model_cfg"]))
    # As they were drawn, 49,408 words are as good: their gradient, all but a few rows 0, was a tenth of a step.
    model.token_embedding.requires_grad_(False)
    return model


def tokenizer() -> open_clip.SimpleTokenizer:
    """CLIP's own tokenizer, for the toy's context length."""
    return open_clip.SimpleTokenizer(context_length=CONFIG["model_cfg"]["text_cfg"]["context_length"])


def normalise(images: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] to what the tower expects: float32, CLIP's mean and deviation."""
    mean, std = (torch.tensor(CONFIG["preprocess_cfg"][name]).view(3, 1, 1) for name in ("mean", "std"))
    return (images.float() / 255 - mean) / std


def save_clip(model: open_clip.CLIP, folder: str | os.PathLike, **notes) -> None:
    """Write open_clip_model.safetensors and open_clip_config.json (with `notes` on the training) to `folder`."""
    folder = Path(folder)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    write_bytes(folder / "open_clip_model.safetensors", save(state))
    write_bytes(folder / "open_clip_config.json", (json.dumps({**CONFIG, "training": notes}, indent=2) + "\n").encode())
