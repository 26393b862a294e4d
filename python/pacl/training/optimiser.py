"""Parameter groups, the schedule of the learning rate, and the running average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def parameter_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict]:
    """Return the groups of an optimiser: matrices decay; gains, biases and scalars do not."""
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def learning_rate(step: int, steps: int, warmup: int, scheduler: str, cooldown: int = 0) -> float:
    """Return the learning rate at `step` of `steps` as a share of the full one: linear warm-up, then "cosine" to 0,
    "const", or "const-cooldown", which falls linearly to 0 over the last `cooldown` steps.
    """
    warm = min(1.0, (step + 1) / warmup) if warmup else 1.0
    if scheduler == "const":
        return warm
    if scheduler == "const-cooldown":
        return warm * min(1.0, (steps - step) / max(1, cooldown))
    done = max(0, step - warmup) / max(1, steps - warmup)
    return warm * (1 + math.cos(math.pi * done)) / 2


def average_of(model: nn.Module, decay: float) -> AveragedModel:
    """Return a running average of `model`, to be updated after every step. The first update copies the weights; later
    ones keep a share `decay` of the average.
    """
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay)).requires_grad_(False)
