"""A CLIP small enough to train from scratch in minutes on one core, with open_clip's classes and file names."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save
from torch import Tensor

from ..files import write_bytes

# open_clip's own config format, so that `open_clip.create_model("local-dir:...")` reads what save_clip writes.
CONFIG: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 128,
        # CLIP pools by the class token, because mean pooling would teach the patches to segment by themselves.
        # Training drops half of the patches: 190 instead of 300 ms a step, at 44 instead of 47 % mIoU.
        "vision_cfg": {
            "image_size": 64,
            "patch_size": 8,
            "width": 128,
            "layers": 3,
            "head_width": 32,
            "patch_dropout": 0.5,
        },
        # One layer: two are slower and reached 52 % mIoU on seen pairs in 1,500 steps, one reached 58 % in 1,000.
        "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 1},
    },
    "preprocess_cfg": {"mean": list(open_clip.OPENAI_DATASET_MEAN), "std": list(open_clip.OPENAI_DATASET_STD)},
}


def new_clip() -> open_clip.CLIP:
    """Return an untrained open_clip.CLIP of CONFIG: patches of 8 pixels, 3 + 1 layers, width 128."""
    model = open_clip.CLIP(**copy.deepcopy(CONFIG["model_cfg"]))
    # Keep the token embedding random: it works as well here, and its mostly zero gradient took a tenth of a step.
    model.token_embedding.requires_grad_(False)
    return model


def tokenizer() -> open_clip.SimpleTokenizer:
    """Return CLIP's own tokenizer, for the toy's context length."""
    return open_clip.SimpleTokenizer(context_length=CONFIG["model_cfg"]["text_cfg"]["context_length"])


def normalise(images: Tensor) -> Tensor:
    """Convert uint8 [B, 3, H, W] to float32, normalised by CLIP's mean and standard deviation."""
    mean, std = (torch.tensor(CONFIG["preprocess_cfg"][name]).view(3, 1, 1) for name in ("mean", "std"))
    return (images.float() / 255 - mean) / std


def save_clip(model: open_clip.CLIP, folder: str | os.PathLike, **notes: Any) -> None:
    """Write open_clip_model.safetensors and open_clip_config.json (with `notes` on the training) to `folder`."""
    folder = Path(folder)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    write_bytes(folder / "open_clip_model.safetensors", save(state))
    write_bytes(folder / "open_clip_config.json", (json.dumps({**CONFIG, "training": notes}, indent=2) + "\n").encode())
