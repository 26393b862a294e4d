"""Which parameters decay, and how the learning rate runs."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import nn


def parameter_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict]:
    """For an optimiser: matrices decay; gains, biases and scalars do not."""
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def learning_rate(step: int, steps: int, warmup: int, scheduler: str) -> float:
    """Share of the full learning rate at `step` of `steps`: linear warm-up, then "cosine" to 0 or "const"."""
    warm = min(1.0, (step + 1) / warmup) if warmup else 1.0
    if scheduler == "const":
        return warm
    done = max(0, step - warmup) / max(1, steps - warmup)
    return warm * (1 + math.cos(math.pi * done)) / 2
