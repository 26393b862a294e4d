"""The two worlds of study.py and the other studies: scenes, a small CLIP for each, and its cached tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import hard_scenes
import numpy as np
import open_clip
import torch
from pacl.backbones import freeze, patch_tokens
from pacl.cross_attention import word_tokens
from pacl.data import scenes
from pacl.demo import toy_clip
from pacl.demo.training import OnePatch, clip_config
from pacl.files import write_bytes
from pacl.progress import Progress
from pacl.training.trainer import Trainer
from safetensors.torch import save
from torch import Tensor


@dataclass(frozen=True)
class World:
    """World of scenes. draw: draws one; kinds: attributes of the first labels; held_out: labels unseen in training."""

    draw: Callable
    draw_train: Callable
    classes: tuple[str, ...]
    kinds: tuple[tuple[str, ...], ...]
    held_out: tuple[int, ...] = ()


WORLDS = {
    "demo": World(
        scenes.draw_scene,
        partial(scenes.draw_scene, pairs=scenes.SEEN),
        scenes.CLASSES,
        scenes.PAIRS,
        scenes.HELD_OUT_LABELS,
    ),
    "hard": World(hard_scenes.draw_scene, hard_scenes.draw_scene, hard_scenes.CLASSES, hard_scenes.KINDS),
}


SPLITS = {"eval": 1, "tune": 2}  # seeds of the evaluation scenes


@dataclass(frozen=True)
class Size:
    """Amounts of work: each run sees `images` and is measured `points` times; `scenes` are drawn and cached."""

    images: int = 131_072
    scenes: int = 8_192
    eval_scenes: int = 512
    clip_steps: int = 700
    clip_scenes: int = 16_384
    points: int = 5


QUICK = Size(images=8_192, scenes=4_096, eval_scenes=64, clip_steps=2, clip_scenes=4_096)


def prepare(name: str, out: Path, size: Size) -> None:
    """Write `out`/NAME.safetensors: all tokens, texts and masks that the runs of that world read."""
    path = out / f"{name}.safetensors"
    if path.exists():
        return
    clip, random, images, captions = train_clip(name, size)
    towers = {"clip": partial(patch_tokens, clip.visual), "random": partial(patch_tokens, random.visual)}
    write_world(path, name, size, clip, towers, images, captions)


def train_clip(
    name: str,
    size: Size,
    watch: Callable[[int, open_clip.CLIP], object] = lambda step, clip: None,
) -> tuple[open_clip.CLIP, open_clip.CLIP, Tensor, list[str]]:
    """Train a world's CLIP. Return it frozen, an untrained one, and the training images and captions of the runs.

    watch: called with the number of each step and the CLIP after it, and with 0 before the first.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    clip = toy_clip.new_clip()
    random = freeze(toy_clip.new_clip())
    watch(0, clip)
    images, captions = training_scenes(name, size.clip_scenes)
    with Progress(f"{name}: CLIP", size.clip_steps) as progress:
        trainer = Trainer(OnePatch(clip), clip_config(size.clip_steps, 64), size.clip_steps)

        def after(loss: Tensor) -> None:
            progress.step(loss)
            watch(progress.done, clip)

        trainer.run(_batches(images, toy_clip.tokenizer()(captions)), after)
    return freeze(clip), random, images[: size.scenes], captions[: size.scenes]


def training_scenes(name: str, count: int) -> tuple[Tensor, list[str]]:
    return _scenes(WORLDS[name].draw_train, count, 0)[:2]


def write_world(
    path: Path,
    name: str,
    size: Size,
    clip: open_clip.CLIP,
    towers: dict[str, Callable[[Tensor], Tensor]],
    images: Tensor,
    captions: list[str],
    splits: tuple[str, ...] = ("eval", "tune"),
) -> None:
    """Write what the runs of a world read; `towers` give tokens [B, N, width] of normalised images."""
    data = {f"train.{tokens_of(tower)}": _tokens(see, images) for tower, see in towers.items()}
    data["train.texts"] = _texts(clip, captions)
    for split in splits:
        data |= evaluation(name, size, clip, towers, split)
    write_bytes(path, save(data))


def tokens_of(tower: str) -> str:
    """Return the name of a tower's tokens in the file of a world, after the split."""
    return "tokens" if tower == "clip" else f"{tower}_tokens"


def evaluation(
    name: str, size: Size, clip: open_clip.CLIP, towers: dict[str, Callable[[Tensor], Tensor]], split: str
) -> dict[str, Tensor]:
    """Return the tokens, texts and masks of a split, "eval" or "tune", and the embeddings of the classes."""
    world = WORLDS[name]
    images, captions, masks = _scenes(world.draw, size.eval_scenes, SPLITS[split])
    data = {f"{split}.{tokens_of(tower)}": _tokens(see, images) for tower, see in towers.items()}
    data |= {f"{split}.texts": _texts(clip, captions), f"{split}.masks": masks}
    return data | {"classes": _texts(clip, list(world.classes))}


@torch.no_grad()
def words(name: str, size: Size, clip: open_clip.CLIP) -> dict[str, Tensor]:
    """Return the words of all texts of a world, as word_tokens gives them: those of the splits and of the classes."""
    world = WORLDS[name]
    texts = {"train.words": training_scenes(name, size.scenes)[1], "classes.words": list(world.classes)}
    for split, seed in SPLITS.items():
        texts[f"{split}.words"] = _scenes(world.draw, size.eval_scenes, seed)[1]
    encode, found = partial(clip.encode_text, normalize=True), {}
    for key, captions in texts.items():
        parts = toy_clip.tokenizer()(captions).split(256)
        found[key] = torch.cat([word_tokens(clip, encode, ids) for ids in parts])
    return found


def _scenes(draw: Callable, count: int, seed: int) -> tuple[Tensor, list[str], Tensor]:
    drawn = [draw(np.random.default_rng([seed, index])) for index in range(count)]
    images = torch.from_numpy(np.stack([scene.image for scene in drawn])).permute(0, 3, 1, 2)
    return images, [scene.caption for scene in drawn], torch.from_numpy(np.stack([scene.mask for scene in drawn]))


def _batches(images: Tensor, tokens: Tensor) -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    while True:
        for index in torch.randperm(len(images), generator=generator).split(64):
            yield {"images": toy_clip.normalise(images[index]), "texts": tokens[index]}


@torch.no_grad()
def _tokens(see: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return torch.cat([see(toy_clip.normalise(part)) for part in images.split(256)])


@torch.no_grad()
def _texts(clip: open_clip.CLIP, texts: list[str]) -> Tensor:
    ids = toy_clip.tokenizer()(texts)
    return torch.cat([clip.encode_text(part, normalize=True) for part in ids.split(256)])
