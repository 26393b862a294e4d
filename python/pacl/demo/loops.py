"""The demo's two training loops: a CLIP from scratch, then an embedder on its frozen tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import open_clip
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from pacl_kernels import fused_pacl_loss

from ..embedder import VisionEmbedder
from ..progress import Progress
from ..training.optimiser import parameter_groups

ATTN_TEMPERATURE = 0.05  # decides whether patches learn to point: at 1 the loss pools almost by the mean
MAX_LOG_SCALE = math.log(100)  # CLIP's own clamp


def pacl(patches: Tensor, texts: Tensor, logit_scale: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The product: attention over patches by each text, `cosine` form; over the batch of the whole group."""
    options = {"form": "cosine", "attn_temperature": ATTN_TEMPERATURE, "group": group}
    return fused_pacl_loss(patches, texts, logit_scale, **options)


def mean_pooling(patches: Tensor, texts: Tensor, logit_scale: Tensor) -> Tensor:
    """The control: the same contrast, every patch with the same weight."""
    pooled = F.normalize(F.normalize(patches, dim=-1).mean(1), dim=-1)
    return open_clip.ClipLoss()(pooled, F.normalize(texts, dim=-1), logit_scale)


def train_clip(model: open_clip.CLIP, batches: Iterable[tuple[Tensor, Tensor]], progress: Progress) -> None:
    """Train on (images, tokens) batches for `progress.total` steps with open_clip's ClipLoss, in place."""
    loss_function = open_clip.ClipLoss()
    optimiser, scheduler = _optimiser(model.parameters(), 1e-3, 0.1, progress.total)
    model.train()
    for images, tokens in batches:
        image_features, text_features, logit_scale = model(images, tokens)
        loss = loss_function(image_features, text_features, logit_scale)
        _step(loss, optimiser, scheduler)
        with torch.no_grad():
            model.logit_scale.clamp_(0, MAX_LOG_SCALE)
        progress.step(loss.detach())
        if progress.done >= progress.total:
            return


def train_embedder(
    embedder: VisionEmbedder,
    loss_function: Callable[[Tensor, Tensor, Tensor], Tensor],
    tokens: Tensor,
    texts: Tensor,
    progress: Progress,
    *,
    batch_size: int,
    seed: int,
    lr: float = 2e-3,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Train on cached tokens [S, N, width] and text embeddings [S, D] for `progress.total` steps, in place.

    The logit scale is learned beside the embedder, from 20. With a group, whose processes hold the same data, each
    takes its part of every batch; `loss_function` must then compute the loss of the group's batch.
    """
    rank, world = (0, 1) if group is None else (group.rank(), group.size())
    model = embedder if group is None else DistributedDataParallel(embedder, process_group=group)
    log_scale = nn.Parameter(torch.tensor(math.log(20.0)))
    optimiser, scheduler = _optimiser([*embedder.parameters(), log_scale], lr, 0.05, progress.total)
    generator = torch.Generator().manual_seed(seed)
    while True:
        for index in torch.randperm(len(tokens), generator=generator).split(batch_size):
            if len(index) < min(batch_size, len(tokens)):
                continue  # a short last batch has fewer negatives
            index = index.tensor_split(world)[rank]
            loss = loss_function(model(tokens[index]), texts[index], log_scale.exp())
            _step(loss, optimiser, scheduler)
            with torch.no_grad():
                log_scale.clamp_(0, MAX_LOG_SCALE)
            progress.step(loss.detach())
            if progress.done >= progress.total:
                return


def _optimiser(parameters: Iterable[nn.Parameter], lr: float, weight_decay: float, steps: int):
    """AdamW and its schedule: warm-up over at most 50 steps, then a cosine to 0. Gains and biases do not decay."""
    groups = parameter_groups(parameters, weight_decay)
    optimiser = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)  # CLIP's and the paper's betas
    warmup = min(50, max(1, steps // 10))

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warmup) * (1 + math.cos(math.pi * step / steps)) / 2

    return optimiser, torch.optim.lr_scheduler.LambdaLR(optimiser, factor)


def _step(loss: Tensor, optimiser: torch.optim.Optimizer, scheduler) -> None:
    optimiser.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimiser.param_groups for p in group["params"]], 1.0)
    optimiser.step()
    scheduler.step()
