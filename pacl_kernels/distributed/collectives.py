"""How the texts of a step travel, and the collectives that move them.

The collectives are PyTorch's functional ones, by name: `torch.compile` takes them, and they are under way until `wait`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Plan(NamedTuple):
    """How the texts of a step travel; alike in every process but for the rank."""

    group: str
    rank: int
    world: int
    capacity: int  # rows of texts that each process sends
    ring: bool
    scatters: bool  # whether the group's backend has a reduce-scatter

    def columns(self, rank: int) -> slice:
        """Where that process's texts stand in the global batch."""
        return slice(rank * self.capacity, (rank + 1) * self.capacity)


def all_gather(x: Tensor, world: int, group: str) -> Tensor:
    return torch.ops._c10d_functional.all_gather_into_tensor(x, world, group)


def all_reduce(x: Tensor, plan: Plan) -> Tensor:
    return torch.ops._c10d_functional.all_reduce(x, "sum", plan.group)


def reduce_scatter(x: Tensor, plan: Plan) -> Tensor:
    """The own rows of the sum over processes."""
    if plan.scatters:
        return wait(torch.ops._c10d_functional.reduce_scatter_tensor(x, "sum", plan.world, plan.group))
    return wait(all_reduce(x, plan))[plan.columns(plan.rank)]


def hop(x: Tensor, plan: Plan) -> Tensor:
    """Sends `[capacity, D]` to the next process of the ring; returns what comes from the previous one."""
    previous, following = ((plan.rank + way) % plan.world for way in (-1, 1))
    received, sent = ([x.shape[0] * (rank == peer) for rank in range(plan.world)] for peer in (previous, following))
    return torch.ops._c10d_functional.all_to_all_single(x, received, sent, plan.group)


def wait(x: Tensor) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(x)


def padded(texts: Tensor, plan: Plan) -> Tensor:
    return F.pad(texts, (0, 0, 0, plan.capacity - texts.shape[0])).contiguous()
