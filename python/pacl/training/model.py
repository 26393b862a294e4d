"""What the optimiser sees of a run."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..backbones import patch_tokens
from ..embedder import VisionEmbedder
from ..towers import Towers, encode_text

if TYPE_CHECKING:
    from .config import TrainConfig

SIGMOID_BIAS = -10.0  # where SigLIP's begins


class Trainable(nn.Module):
    """The embedder, the logit scale, attention temperature and bias where learned, and the towers that are trained.

    Frozen towers stay outside: checkpoints, DDP and an average of the weights have no business with them.
    """

    def __init__(self, embedder: VisionEmbedder, config: TrainConfig, towers: Towers | None = None):
        super().__init__()
        self.embedder = embedder
        trained = [] if towers is None else towers.trained
        self.visual = towers.visual if "visual" in trained else None
        self.text = towers.text if "text" in trained else None
        self.log_scale = nn.Parameter(torch.tensor(math.log(config.logit_scale)), config.learn_logit_scale)
        self.log_temperature = self.bias = None
        if config.learn_attn_temperature:
            self.log_temperature = nn.Parameter(torch.tensor(math.log(config.attn_temperature)))
        if config.loss == "sigmoid":
            self.bias = nn.Parameter(torch.tensor(SIGMOID_BIAS))

    def train(self, mode: bool = True) -> Trainable:
        """Towers stay in eval mode, as `Towers` says."""
        super().train(mode)
        for tower in (self.visual, self.text):
            if tower is not None:
                tower.eval()
        return self

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, ...]:
        """Patch embeddings, text embeddings, the logit scale, and what is learned of attention temperature and bias.

        images: of a tower that is trained, else its tokens; texts: token ids for one that is trained, else embeddings.
        """
        tokens = images if self.visual is None else patch_tokens(self.visual, images)
        embedded = texts if self.text is None else encode_text(self.text, texts)
        temperature = () if self.log_temperature is None else (self.log_temperature.exp(),)
        bias = () if self.bias is None else (self.bias * 1.0,)
        patches = self.embedder(tokens)
        return patches, embedded.to(patches.dtype), self.log_scale.exp(), *temperature, *bias

    @torch.no_grad()
    def patches_of(self, images: Tensor, towers: Towers) -> Tensor:
        """Patch embeddings [B, N, D] of images [B, 3, H, W] on any device, by these weights and the frozen ones of
        `towers`."""
        return self.embedder(self.towers_of(towers).tokens(images.to(self.log_scale.device, non_blocking=True)))

    @torch.no_grad()
    def texts_of(self, captions: list[str], towers: Towers) -> Tensor:
        """Text embeddings [B, D] of captions, by these weights and the frozen ones of `towers`."""
        return self.towers_of(towers).encode_text(towers.tokenize(captions).to(self.log_scale.device))

    def towers_of(self, towers: Towers) -> Towers:
        """`towers`, those that are trained replaced by the ones of this module."""
        return dataclasses.replace(towers, **{name: getattr(self, name) for name in towers.trained})

    def tower_parameters(self) -> list[nn.Parameter]:
        """Those of the towers, which may have a learning rate of their own."""
        return [x for module in (self.visual, self.text) if module is not None for x in module.parameters()]
