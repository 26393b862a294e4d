"""Tokens, captions and masks of all scenes, computed once by frozen towers and kept in files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from pacl.files import write_bytes
from pacl.progress import Progress
from pacl.towers import Towers
from PIL import Image
from real_words_pictures import SPLITS, World, draw_scene, phrase
from safetensors.torch import load_file, save
from torch import Tensor

BATCH = 32


@dataclass(frozen=True)
class Split:
    """Cached scenes: tokens bfloat16 [S, N, width], texts [S, D], masks uint8 [S, MASK, MASK], and S captions.

    objects: the indices of the words in each scene.
    """

    tokens: Tensor
    texts: Tensor
    masks: Tensor
    captions: list[str]
    objects: list[list[int]]


def prepare(name: str, towers: Towers, world: World, scenes: dict[str, int], out: Path) -> None:
    """Write `out`/NAME-SPLIT.safetensors and .json of every split, and `out`/NAME-words.safetensors, if missing.

    scenes: how many of each split.
    """
    torch.set_num_threads(1)
    if not (path := out / f"{name}-words.safetensors").exists():
        write_bytes(path, save({"words": towers.embed([phrase(word) for word in world.words])}))
    for split in SPLITS:
        path = out / f"{name}-{split}.safetensors"
        if path.exists():
            continue
        parts, masks, captions, objects = [], [], [], []
        with Progress(f"{name}: {split}", scenes[split], unit="scene") as progress:
            for start in range(0, scenes[split], BATCH):
                drawn = [draw_scene(world, split, i) for i in range(start, min(start + BATCH, scenes[split]))]
                images = torch.stack([towers.transform(Image.fromarray(scene.image)) for scene in drawn])
                # On a CPU with bfloat16 products this halves the time; tokens are kept in bfloat16 anyway.
                with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                    parts.append(towers.tokens(images).bfloat16())
                masks += [torch.from_numpy(scene.mask) for scene in drawn]
                captions += [scene.caption for scene in drawn]
                objects += [list(scene.words) for scene in drawn]
                progress.step(count=len(drawn))
        data = {"tokens": torch.cat(parts), "texts": towers.embed(captions), "masks": torch.stack(masks)}
        write_bytes(path.with_suffix(".json"), json.dumps({"captions": captions, "objects": objects}).encode())
        write_bytes(path, save(data))


def read_split(name: str, split: str, out: Path) -> Split:
    path = out / f"{name}-{split}.safetensors"
    return Split(**load_file(path), **json.loads(path.with_suffix(".json").read_text()))


def read_words(name: str, out: Path) -> Tensor:
    """Return the embeddings [K, D] of the words, each with its article."""
    return load_file(out / f"{name}-words.safetensors")["words"]
