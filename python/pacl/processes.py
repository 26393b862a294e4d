"""Where a command runs: its device, and the processes that torchrun started."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist


def choose_device(name: str) -> torch.device:
    """Device of a --device flag; "auto" is a GPU where there is one."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def group_device(group: dist.ProcessGroup) -> torch.device:
    """Where tensors must lie for the group to exchange them."""
    return torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")


def process_group(device: torch.device) -> dist.ProcessGroup | None:
    """All processes that torchrun started, to exchange tensors of `device`, or the caller's own group; None for one
    alone."""
    if dist.is_initialized():
        return dist.group.WORLD
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return None
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.group.WORLD
