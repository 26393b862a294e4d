"""Agreement of the processes of a group on their settings and on the number of texts that each of them sends."""

from __future__ import annotations

import functools
import struct
import weakref
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..autograd import Options
from ..checks import DTYPES, FORMS, NORMALIZE, TEXT_POOLS, Inputs
from . import collectives
from .collectives import Plan

GATHER_BYTES = 8 * 2**30  # "auto" gathers up to this size of the arrays that grow with the global batch
_NONE, _A_TENSOR, _A_NUMBER = -1, -2, -3  # codes of settings, see `Setting`


class Setting(NamedTuple):
    """Value that must agree on all ranks, encoded as an integer for the all-gather.

    `kind`: the type of the value, or the tuple of allowed values.
    """

    value: Any
    kind: type | tuple[Any, ...]

    def code(self, numbers: bool = True) -> int:
        """Return the integer; with `numbers=False` all floats share one, because schedules may change them."""
        if self.value is None or isinstance(self.value, Tensor):
            return _NONE if self.value is None else _A_TENSOR
        if self.kind is float:
            return struct.unpack("q", struct.pack("d", self.value))[0] if numbers else _A_NUMBER
        return int(self.value) if self.kind in (int, bool) else self.kind.index(self.value)  # type: ignore[union-attr]

    def name(self, code: int) -> str:
        if code in (_NONE, _A_TENSOR):  # as floats these codes are NaN
            return "None" if code == _NONE else "a tensor"
        if self.kind is float:
            return repr(struct.unpack("d", struct.pack("q", code))[0])
        return repr(self.kind(code) if isinstance(self.kind, type) else self.kind[code])


def settings_of_phi(inputs: Inputs, options: Options) -> dict[str, Setting]:
    """Return the settings of φ, on which all processes must agree."""
    patches, texts = inputs.patches, inputs.texts
    kind = "single" if options.text_pool is None else "tokens" if inputs.text_lengths is None else "packed"
    return {
        "form": Setting(options.form, FORMS),
        "patches' D": Setting(patches.shape[-1], int),
        "patches' dtype": Setting(patches.dtype, DTYPES),
        "attn_temperature": Setting(inputs.attn_temperature, float),
        "texts' layout": Setting(kind, ("single", "tokens", "packed")),
        "texts' L": Setting(texts.shape[1] if texts.ndim == 3 else 0, int),
        "text_mask": Setting("none" if inputs.text_mask is None else "given", ("none", "given")),
        "text_pool": Setting(options.text_pool, TEXT_POOLS),
        "text_pool_scale": Setting(options.text_pool_scale, float),
        "null_patch": Setting(options.null_patch, bool),
        "normalize": Setting(options.normalize, NORMALIZE),
    }


def make_plan(
    group: dist.ProcessGroup, inputs: Inputs, settings: dict[str, Setting], fixed_sizes: bool = False
) -> tuple[Plan, Tensor]:
    """Return the plan for the texts, and all processes' headers `[world, 2 + settings]`, to be waited for.

    A header starts with the numbers of texts and of their rows. On a CPU every call reads the headers, and the capacity
    is what this step needs. Elsewhere reading them would make the host wait for the device. There only the first call
    with given settings reads them (numbers, which a schedule may change, do not count), and its capacity stays: smaller
    batches may follow. Inside `torch.compile` nothing is read, and every process must bring the same number of texts.

    `fixed_sizes` demands the number of texts of the first call in every call, so that the plan always has the sizes.

    Raises ValueError if settings differ, in every process that reads the headers, and for a batch above the capacity.
    """
    texts, world, capacity, rows = inputs.texts, group.size(), inputs.text_count, inputs.texts.shape[0]
    device = texts.device
    compiling, agreed, read, sizes = torch.compiler.is_compiling(), None, None, None
    # While compiling, a number may be a symbol, which has no bits.
    codes = tuple(setting.code(numbers=not compiling) for setting in settings.values())
    if compiling or may_read(device):
        header = torch.tensor((capacity, rows, *codes), device=device)
    else:
        key = tuple(setting.code(numbers=False) for setting in settings.values())
        capacities = _capacities.setdefault(group, {})
        agreed = capacities.get(key)
        header = _on_device((capacity, rows, *(codes if agreed is None else key)), device)
    headers = collectives.all_gather(header, world, group.group_name).view(world, -1)
    if not compiling:
        if agreed is None:
            read = agreed = _compare(collectives.wait(headers).tolist(), settings)
            if not may_read(device):
                capacities[key] = agreed
        most, most_rows = (max(x) for x in zip(*agreed, strict=True))
        for count, limit, what in ((rows, most_rows, "rows"), (capacity, most, "texts")):
            if count > limit:
                raise ValueError(
                    f"texts has {count} {what}, expected at most {limit}, the largest local batch of the first step "
                    "with this group (pacl_kernels.distributed.forget(group) in every process allows more)"
                )
        if fixed_sizes and capacity != agreed[group.rank()][0]:
            raise ValueError(
                f"texts has {capacity} rows, expected {agreed[group.rank()][0]} as in the first call with this group "
                "(pacl_kernels.distributed.forget(group) in every process allows another number)"
            )
        capacity, rows = most, most_rows
        read = agreed if fixed_sizes else read
        sizes = None if read is None else tuple(count for count, _ in read)
    exchange = settings["exchange"].value
    ring = exchange == "ring"
    if exchange == "auto":
        row = texts.numel() // max(texts.shape[0], 1)
        ring = gathered_bytes(world, rows, row, texts.element_size()) > GATHER_BYTES
    scatters = device.type != "cpu" and (compiling or dist.get_backend(group) != "gloo")
    sizes = (capacity,) * world if compiling else sizes
    return Plan(group.group_name, group.rank(), world, capacity, rows, ring, scatters, sizes), headers


def gathered_bytes(world: int, capacity: int, d: int, itemsize: int) -> int:
    """Return the bytes that grow with the global batch: texts, two float32 gradients, four [B_local, B_global]."""
    return world * capacity * (d * (itemsize + 8) + 16 * capacity)


# Texts and their rows of each process in the first step, by settings. Not used on a CPU, where every step reads the
# headers.
_capacities: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[tuple[int, ...], tuple[tuple[int, int], ...]]] = (
    weakref.WeakKeyDictionary()
)


def may_read(device: torch.device) -> bool:
    """Return True if the host may read the result of a collective on this device in every step."""
    return device.type == "cpu"


def forget(group: dist.ProcessGroup) -> None:
    """Let the next step on a GPU agree again on the largest local batch; call this in every process of the group."""
    _capacities.pop(group, None)


@functools.lru_cache(maxsize=256)
def _on_device(codes: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(codes, device=device)  # cached: a copy from the host may wait for the device


def _compare(headers: list[list[int]], settings: dict[str, Setting]) -> tuple[tuple[int, int], ...]:
    """Return the numbers of texts and of their rows of each process; raise ValueError if settings differ."""
    for rank, header in enumerate(headers):
        for (name, setting), first, other in zip(settings.items(), headers[0][2:], header[2:], strict=True):
            if first != other and _A_NUMBER not in (first, other):
                raise ValueError(
                    f"{name} is {setting.name(first)} on rank 0 of the group and {setting.name(other)} on rank {rank}, "
                    "expected the same in every process"
                )
    return tuple((header[0], header[1]) for header in headers)
