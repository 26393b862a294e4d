"""What the processes of a group agree on: the settings, and how many texts each one sends."""

from __future__ import annotations

import functools
import struct
import weakref
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import collectives
from .collectives import Plan

GATHER_BYTES = 8 * 2**30  # of what grows with the global batch in one process, up to which "auto" gathers
_NONE, _A_TENSOR, _A_NUMBER = -1, -2, -3  # codes of settings, see `Setting`


class Setting(NamedTuple):
    """A value that must agree on all ranks, encoded as an integer for the all-gather.

    `kind`: its type, or the tuple of the values that it may have.
    """

    value: object
    kind: type | tuple

    def code(self, numbers: bool = True) -> int:
        """The integer; with `numbers=False` all floats share one, because schedules may change them."""
        if self.value is None or isinstance(self.value, Tensor):
            return _NONE if self.value is None else _A_TENSOR
        if self.kind is float:
            return struct.unpack("q", struct.pack("d", self.value))[0] if numbers else _A_NUMBER
        return int(self.value) if self.kind in (int, bool) else self.kind.index(self.value)

    def name(self, code: int) -> str:
        if code in (_NONE, _A_TENSOR):  # as floating-point numbers these are NaN
            return "None" if code == _NONE else "a tensor"
        if self.kind is float:
            return repr(struct.unpack("d", struct.pack("q", code))[0])
        return repr(self.kind(code) if isinstance(self.kind, type) else self.kind[code])


def make_plan(group: dist.ProcessGroup, texts: Tensor, settings: dict[str, Setting]) -> tuple[Plan, Tensor]:
    """The plan for `texts` `[B_local, D]`, and what each process said, `[world, 1 + settings]`, to be waited for.

    First in a row is the number of texts. Settings that differ are a ValueError in every process that looks: on a CPU
    at every call, and there the capacity is what this step needs. Elsewhere looking would make the host wait for the
    device, so processes look at their first call (numbers, which a schedule may change, aside) and the capacity stays:
    smaller batches may follow, a larger one is a ValueError. Inside `torch.compile` nobody looks, and every process
    must bring as many texts.
    """
    world, capacity, d, device = group.size(), texts.shape[0], texts.shape[1], texts.device
    compiling, agreed = torch.compiler.is_compiling(), None
    # While compiling, a number may be a symbol that has no bits.
    codes = tuple(setting.code(numbers=not compiling) for setting in settings.values())
    if compiling or may_read(device):
        header = torch.tensor((capacity, *codes), device=device)
    else:
        key = tuple(setting.code(numbers=False) for setting in settings.values())
        capacities = _capacities.setdefault(group, {})
        agreed = capacities.get(key)
        header = _on_device((capacity, *(codes if agreed is None else key)), device)
    headers = collectives.all_gather(header, world, group.group_name).view(world, -1)
    if not compiling:
        if agreed is None:
            agreed = _compare(collectives.wait(headers).tolist(), settings)
            if not may_read(device):
                capacities[key] = agreed
        if capacity > agreed:
            raise ValueError(
                f"texts has {capacity} rows, expected at most {agreed}, the largest local batch of the first step with "
                "this group (pacl_kernels.distributed.forget(group) in every process allows more)"
            )
        capacity = agreed
    exchange = settings["exchange"].value
    ring = exchange == "ring"
    if exchange == "auto":
        ring = gathered_bytes(world, capacity, d, texts.element_size()) > GATHER_BYTES
    scatters = device.type != "cpu" and (compiling or dist.get_backend(group) != "gloo")
    return Plan(group.group_name, group.rank(), world, capacity, ring, scatters), headers


def gathered_bytes(world: int, capacity: int, d: int, itemsize: int) -> int:
    """What grows with the global batch: texts, two float32 arrays of their gradient, four of [B_local, B_global]."""
    return world * capacity * (d * (itemsize + 8) + 16 * capacity)


# By settings: the largest local batch of any process (not for a CPU, where every step asks).
_capacities: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[tuple, int]] = weakref.WeakKeyDictionary()


def may_read(device: torch.device) -> bool:
    """True where the host may read what a collective on this device returned, at every step."""
    return device.type == "cpu"


def forget(group: dist.ProcessGroup) -> None:
    """Lets the next step on a GPU agree anew on the largest local batch; to be called in every process of the group."""
    _capacities.pop(group, None)


@functools.lru_cache(maxsize=256)
def _on_device(codes: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(codes, device=device)  # kept: a copy from the host may wait for the device


def _compare(headers: list[list[int]], settings: dict[str, Setting]) -> int:
    """The largest local batch; ValueError if settings differ."""
    for rank, header in enumerate(headers):
        for (name, setting), first, other in zip(settings.items(), headers[0][1:], header[1:], strict=True):
            if first != other and _A_NUMBER not in (first, other):
                raise ValueError(
                    f"{name} is {setting.name(first)} on rank 0 of the group and {setting.name(other)} on rank {rank}, "
                    "expected the same in every process"
                )
    return max(header[0] for header in headers)
