"""A data set shared among processes: which part is whose, and how their results become one."""

from __future__ import annotations

import contextlib

import torch
import torch.distributed as dist
from torch import Tensor

from ..processes import group_device
from ..progress import Progress


def place_in(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """This process's number and how many there are; 0 and 1 for None."""
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))


def add_up(values: Tensor, group: dist.ProcessGroup | None) -> None:
    """In place, the sum over all processes; exact where each entry is of one process and 0 on the others."""
    if group is not None:
        there = values.to(group_device(group))
        dist.all_reduce(there, group=group)
        values.copy_(there)


def gather_rows(rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The rows [n, D] of all processes, one process after the other. n may be 0, and D 0 there too."""
    if group is None:
        return rows
    there = rows.to(group_device(group))
    shapes = [torch.empty(2, dtype=torch.int64, device=there.device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shapes, torch.tensor(there.shape, device=there.device), group=group)
    most, width = torch.stack(shapes).amax(0).tolist()
    padded = there.new_zeros(most, width)
    padded[: there.shape[0], : there.shape[1]] = there
    parts = [torch.empty_like(padded) for _ in shapes]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[: int(shape[0])] for part, shape in zip(parts, shapes, strict=True)]).to(rows.device)


def progress(label: str, total: int, unit: str, group: dist.ProcessGroup | None) -> contextlib.AbstractContextManager:
    """The first process's, of its own share; the others show none."""
    return Progress(label, max(1, total), unit) if place_in(group)[0] == 0 else _Silent()


class _Silent:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def step(self):
        pass
