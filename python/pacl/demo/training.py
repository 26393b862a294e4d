"""The demo's models for the loop of `pacl train`: a CLIP from scratch, then embedders on its frozen tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from ..backbones import patch_tokens
from ..data.samples import loader
from ..data.shards import Shards
from ..progress import Progress
from ..training.config import TrainConfig
from .toy_clip import normalise, tokenizer

ATTN_TEMPERATURE = 0.05  # low enough to align single patches: at 1 the loss pools almost by the mean
MEAN_POOLING = 1e4  # attention temperature of the control: equal weights of all patches, to one part in 10,000


class OnePatch(nn.Module):
    """A CLIP for the training loop: each image is a single patch, so the loss is CLIP's own."""

    def __init__(self, clip: open_clip.CLIP):
        super().__init__()
        self.clip = clip

    @property
    def log_scale(self) -> nn.Parameter:
        return self.clip.logit_scale

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        image, text, scale = self.clip(images, texts)
        return image[:, None], text, scale


def clip_config(steps: int, batch_size: int) -> TrainConfig:
    """Return the config of the CLIP's training."""
    return _config(steps, batch_size=batch_size, lr=1e-3, wd=0.1, form="dot")


def embedder_config(steps: int, batch_size: int, **changes: Any) -> TrainConfig:
    """Return the config of an embedder's training: PACL's, with `changes`."""
    values = {"lr": 2e-3, "wd": 0.05, "logit_scale": 20.0, "attn_temperature": ATTN_TEMPERATURE}
    return _config(steps, batch_size=batch_size, **values | changes)


def _config(steps: int, **values: Any) -> TrainConfig:
    return TrainConfig(eps=1e-8, warmup=min(50, max(1, steps // 10)), **values)


def clip_pairs(shards: list, batch_size: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Yield batches of images and token ids, without end."""
    encode = tokenizer()
    for batch in loader(Shards(shards, shuffle=2000, seed=seed, repeat=True), batch_size, drop_last=True):
        yield {"images": normalise(batch["image"]), "texts": encode(batch["caption"])}


def frozen_features(clip: open_clip.CLIP, shards: list, count: int) -> tuple[Tensor, Tensor]:
    """Return patch tokens [count, N, width] and text embeddings [count, D] of the first `count` scenes."""
    encode, tokens, texts = tokenizer(), [], []
    with Progress("Frozen tokens", count, unit="scene") as progress:
        for batch in loader(Shards(shards), 64):
            tokens.append(patch_tokens(clip.visual, normalise(batch["image"])))
            texts.append(clip.encode_text(encode(batch["caption"]), normalize=True))
            progress.step(count=min(len(texts[-1]), count - progress.done))
            if progress.done >= count:
                break
    return torch.cat(tokens)[:count], torch.cat(texts)[:count]


def embedder_pairs(
    tokens: Tensor, texts: Tensor, batch_size: int, seed: int, rank: int = 0, world: int = 1
) -> Iterator[dict[str, Tensor]]:
    """Yield batches of cached tokens [S, N, width] and text embeddings [S, D] without end, in a new order every epoch.

    rank, world: index and number of the processes; each takes its part of every batch of `batch_size`.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        for index in torch.randperm(len(tokens), generator=generator).split(batch_size):
            if len(index) < min(batch_size, len(tokens)):
                continue  # a short last batch has fewer negatives
            index = index.tensor_split(world)[rank]
            yield {"images": tokens[index], "texts": texts[index]}
