"""The plan of a step, and the collectives that move its texts.

They are PyTorch's functional collectives, called by name: `torch.compile` supports them, and they run in the background
until `wait`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Plan(NamedTuple):
    """Plan of the exchange of texts in a step; the same in every process except for the rank."""

    group: str
    rank: int
    world: int
    capacity: int  # texts that each process sends
    rows: int  # their rows: tokens if texts are packed, otherwise as many as texts
    ring: bool
    scatters: bool  # the backend of the group has a reduce-scatter
    sizes: tuple[int, ...] | None  # texts of each process; None where only the device knows them

    def columns(self, rank: int) -> slice:
        """Return the place of that process's texts in the global batch."""
        return slice(rank * self.capacity, (rank + 1) * self.capacity)

    def real(self, rank: int) -> slice:
        """Return that place without the padding, where the number of texts is known."""
        at = self.columns(rank)
        return at if self.sizes is None else slice(at.start, at.start + self.sizes[rank])


def all_gather(x: Tensor, world: int, group: str) -> Tensor:
    result: Tensor = torch.ops._c10d_functional.all_gather_into_tensor(x, world, group)
    return result


def all_reduce(x: Tensor, plan: Plan, operation: str = "sum") -> Tensor:
    result: Tensor = torch.ops._c10d_functional.all_reduce(x, operation, plan.group)
    return result


def reduce_scatter(x: Tensor, plan: Plan) -> Tensor:
    """Return this process's rows of the sum over all processes."""
    if plan.scatters:
        return wait(torch.ops._c10d_functional.reduce_scatter_tensor(x, "sum", plan.world, plan.group))
    mine: Tensor = wait(all_reduce(x, plan))[plan.rank * plan.rows : (plan.rank + 1) * plan.rows]
    return mine


def hop(x: Tensor, plan: Plan) -> Tensor:
    """Send rows `[plan.rows, ...]` to the next process of the ring and return that of the previous one."""
    previous, following = ((plan.rank + way) % plan.world for way in (-1, 1))
    received, sent = ([x.shape[0] * (rank == peer) for rank in range(plan.world)] for peer in (previous, following))
    result: Tensor = torch.ops._c10d_functional.all_to_all_single(x, received, sent, plan.group)
    return result


def wait(x: Tensor) -> Tensor:
    result: Tensor = torch.ops._c10d_functional.wait_tensor(x)
    return result


def padded(texts: Tensor, plan: Plan) -> Tensor:
    """Return the rows of the own texts, padded to those that each process sends."""
    return F.pad(texts, (0, 0) * (texts.ndim - 1) + (0, plan.rows - texts.shape[0])).contiguous()
