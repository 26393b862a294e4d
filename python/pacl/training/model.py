"""The module that a run optimises."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from ..backbones import packed_tokens, patch_tokens
from ..cross_attention import CrossAttention
from ..embedder import VisionEmbedder
from ..resolution import moved
from ..towers import Towers, encode_text

if TYPE_CHECKING:
    from .config import TrainConfig

SIGMOID_BIAS = -10.0  # SigLIP's initial value


class Trainable(nn.Module):
    """The embedder, the logit scale, what else is learned (attention temperature, bias, head), and the trained towers.

    Frozen towers stay outside: checkpoints, DDP and the average of the weights must not include them.
    """

    def __init__(self, embedder: VisionEmbedder, config: TrainConfig, towers: Towers | None = None):
        super().__init__()
        self.embedder = embedder
        self.visual = towers.visual if towers is not None and "visual" in towers.trained else None
        self.text = towers.text if towers is not None and "text" in towers.trained else None
        self.log_scale = nn.Parameter(torch.tensor(math.log(config.logit_scale)), config.learn_logit_scale)
        self.log_temperature: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        self.head: CrossAttention | None = None
        if config.learn_attn_temperature:
            self.log_temperature = nn.Parameter(torch.tensor(math.log(config.attn_temperature)))
        if config.loss == "sigmoid":
            self.bias = nn.Parameter(torch.tensor(SIGMOID_BIAS))
        if config.align == "cross-attention":
            self.head = CrossAttention(embedder.config["out_dim"], config.attn_temperature)

    def train(self, mode: bool = True) -> Trainable:
        """Set the mode of all modules but the towers, which stay in eval mode (see `Towers`)."""
        super().train(mode)
        for tower in (self.visual, self.text):
            if tower is not None:
                tower.eval()
        return self

    def forward(self, images: Tensor | list[Tensor], texts: Tensor) -> tuple[Tensor, ...]:
        """Return patch embeddings, text embeddings, the logit scale, and the attention temperature and bias if learned.

        images: images [B, 3, H, W] if the vision tower is trained, else its tokens [B, N, width]. texts: token ids
        [B, L] if the text tower is trained, else text embeddings [B, D], or words [B, W, D] for a head. Of a tower with
        max_patches, images are a list of [3, H, W] and tokens and patches are packed, [sum of N, width].
        """
        if isinstance(images, list):
            tokens = packed_tokens(cast(nn.Module, self.visual), images)[0]
        else:
            tokens = images if self.visual is None else patch_tokens(self.visual, images)
        embedded = texts if self.text is None else encode_text(self.text, texts)
        temperature = () if self.log_temperature is None else (self.log_temperature.exp(),)
        bias = () if self.bias is None else (self.bias * 1.0,)
        patches = self.embedder(tokens)
        return patches, embedded.to(patches.dtype), self.log_scale.exp(), *temperature, *bias

    @torch.no_grad()
    def patches_of(self, images: Tensor | list[Tensor], towers: Towers) -> tuple[Tensor, Tensor | None]:
        """Return patch embeddings of images on any device, and their lengths, as `towers.packed` does.

        Frozen weights are those of `towers`.
        """
        tokens, lengths = self.towers_of(towers).packed(moved(images, self.log_scale.device))
        return self.embedder(tokens), lengths

    @torch.no_grad()
    def texts_of(self, captions: list[str], towers: Towers) -> Tensor:
        """Return text embeddings [B, D] of captions; frozen weights are those of `towers`."""
        return self.towers_of(towers).encode_text(towers.tokenize(captions).to(self.log_scale.device))

    def towers_of(self, towers: Towers) -> Towers:
        """Return `towers` with the trained ones replaced by those of this module."""
        return dataclasses.replace(towers, **{name: getattr(self, name) for name in towers.trained})

    def tower_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the trained towers and of the head, which may have a learning rate of their own."""
        modules = (self.visual, self.text, self.head)
        return [x for module in modules if module is not None for x in module.parameters()]
