"""The device of a command, the processes that torchrun started, and exchanges between them."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .progress import Progress, quiet

T = TypeVar("T")


def choose_device(name: str) -> torch.device:
    """Return the device of a --device flag; "auto" is a GPU if there is one.

    Raises ValueError for an unknown device and for a GPU that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: got {name!r}, expected auto, cpu, cuda, cuda:1, ...") from error
    if device.type == "meta":
        raise ValueError("device: got 'meta', which holds no numbers, expected auto, cpu, cuda, cuda:1, ...")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        there = f"the {count} GPUs cuda:0 to cuda:{count - 1}" if count else "no GPU"
        raise ValueError(f"device: got {name!r}, but PyTorch finds {there}; expected one that is there, auto or cpu")
    if device.type not in ("cpu", "cuda"):
        try:
            torch.empty(0, device=device)
        except Exception as error:  # each kind of device has an exception of its own
            raise ValueError(
                f"device: got {name!r}, which this PyTorch cannot use; expected one that is there, auto or cpu"
            ) from error
    return device


def process_device(name: str) -> torch.device:
    """Return the device of a --device flag for a process that torchrun started: "auto" and "cuda" are its own GPU."""
    device = choose_device(name)
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        device = choose_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(device)
    return device


def default_workers() -> int:
    """Return the number of processes that read data unless --workers says otherwise: 4, or one for each core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(4, cores)


def group_device(group: dist.ProcessGroup) -> torch.device:
    """Return the device of the tensors that the group can exchange."""
    return torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")


def process_group(device: torch.device, timeout: float | None = None) -> dist.ProcessGroup | None:
    """Return the group of all processes that torchrun started, or the one already initialised; None for one process.

    device: that of the tensors to exchange. timeout: seconds after which a collective fails; None: PyTorch's.
    """
    if dist.is_initialized():
        return dist.group.WORLD
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return None
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    limit = None if timeout is None else datetime.timedelta(seconds=timeout)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=limit)
    return dist.group.WORLD


def patient_group() -> dist.ProcessGroup | None:
    """Return a group of all processes that wait a week for each other, on the CPU; None for one process.

    It is for shares of work that may end hours apart. A process that dies is noticed at once.
    """
    if process_group(torch.device("cpu")) is None:
        return None
    group = dist.new_group(timeout=datetime.timedelta(days=7), backend="gloo")
    assert isinstance(group, dist.ProcessGroup)  # every process is in it
    return group


def place_in(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Return the rank of this process and the number of processes; 0 and 1 for None."""
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))


def from_first(run: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """Return in all processes what `run` returns in the first, plain Python.

    Raises what `run` raises in the first process, and SystemExit in the others.
    """
    if group is None:
        return run()
    answer: list[Any] = [False, None]
    try:
        if dist.get_rank(group) == 0:
            answer = [True, run()]
    finally:
        dist.broadcast_object_list(answer, src=0, group=group)
    if not answer[0]:
        raise SystemExit(1)
    return answer[1]


def add_up(values: Tensor, group: dist.ProcessGroup | None) -> None:
    """Sum `values` over all processes, in place; exact if each entry is 0 on all processes but one."""
    if group is not None:
        there = values.to(group_device(group))
        dist.all_reduce(there, group=group)
        values.copy_(there)


def gather_objects(value: T, group: dist.ProcessGroup | None) -> list[T]:
    """Return the values, plain Python, of all processes in the order of their ranks."""
    if group is None:
        return [value]
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found


def gather_rows(rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return the rows [n, D] of all processes, in the order of their ranks. n may be 0, and then D too."""
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


def shared_progress(label: str, total: int | None, unit: str, group: dist.ProcessGroup | None) -> Progress:
    """Return a Progress over this process's share of the data; only the first process of the group shows it."""
    with quiet() if place_in(group)[0] else contextlib.nullcontext():
        return Progress(label, total if total is None else max(1, total), unit)
