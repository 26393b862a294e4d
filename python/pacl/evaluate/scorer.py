"""Score whole images against texts: by φ, or by plain CLIP's cosine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pacl_kernels import compatibility

from ..embedder import DEFAULT_ATTN_TEMPERATURE, DEFAULT_FORM
from ..resolution import moved, split_patches
from ..segment.predict import own_projection
from ..towers import Towers

SCORES = 2**23  # most scores in memory at a time: 32 MiB


class Scorer:
    """Scorer of whole images: `scorer.blocks(images, texts)` yields scores [b, K], block by block.

    embedder: maps patch tokens to the texts' space; None takes the model's own projection of single patches, see
    own_projection. plain: use the model's own image embedding instead, without patches; raises ValueError if it has
    none. φ has the form and attention temperature that the embedder was trained with, or `pacl train`'s defaults.
    `rules` describes the scorer in results.
    """

    def __init__(self, towers: Towers, embedder: nn.Module | None = None, *, plain: bool = False):
        self.towers = towers
        self.rules: dict[str, Any] = {"name": "plain"}
        self.device = next(towers.text.parameters()).device
        self.embed = None
        if plain:
            if towers.names["vision_model"]:
                raise ValueError(
                    f"plain: got True with {towers.names['vision_model']}, expected False: its images have no embedding"
                )
            return
        self.embed = embedder or own_projection(towers.visual)
        config: dict[str, Any] = getattr(embedder, "config", {})
        self.rules = {"name": "phi"}
        self.rules["form"] = config.get("form", DEFAULT_FORM)
        self.rules["attn_temperature"] = config.get("attn_temperature", DEFAULT_ATTN_TEMPERATURE)

    @torch.no_grad()
    def blocks(self, images: Tensor | list[Tensor], texts: Tensor) -> Iterator[Tensor]:
        """Yield scores [b, K] of normalised images [B, 3, H, W] with texts [K, D], in order, at most SCORES at once.

        images: a list of [3, H, W] for towers with max_patches.
        """
        images = moved(images, self.device)
        size = max(1, SCORES // max(1, len(texts)))
        if self.embed is None:
            found = self.towers.visual(images)
            found = found[0] if isinstance(found, tuple) else found  # CoCa returns its tokens too
            for part in F.normalize(found.float(), dim=-1).split(size):
                yield part @ texts.T
            return
        form, temperature = self.rules["form"], self.rules["attn_temperature"]
        tokens, lengths = self.towers.packed(images)
        for part, counts in split_patches(self.embed(tokens).float(), lengths, size):
            yield compatibility(part, texts, patch_lengths=counts, attn_temperature=temperature, form=form)
