"""What the launches of Triton's kernels share: how one is started, and what depends on the device."""

from __future__ import annotations

import contextlib
import functools
from types import ModuleType

import torch
from torch import Tensor

from ...constants import RUNNING_MAX_BELOW

_INTERPRETER_PROGRAMS = 3  # fewer than items, so that programs of the interpreter loop as those of a GPU do


@functools.cache
def kernels() -> ModuleType:
    """The kernels' package, which imports triton: not before a kernel is needed."""
    from . import kernels as package

    return package


def run(
    kernel, programs: int, arguments: tuple, constants: dict, warps=4, stages=3, registers: int = 0, fma: bool = True
) -> None:
    """Launch `programs` programs of a kernel. `fma`: the compiler may fuse multiply-adds."""
    limit = {"maxnreg": registers} if registers else {}  # of NVIDIA's alone
    options = dict(num_warps=warps, num_stages=stages, enable_fp_fusion=fma)
    kernel[(programs,)](*arguments, **constants, **options, **limit)


def programs(device: torch.device, per_processor: int) -> int:
    return _INTERPRETER_PROGRAMS if device.type == "cpu" else processors(device) * per_processor


@functools.cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def on_device(x: Tensor):
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def mask_strides(mask: Tensor | None) -> tuple[int, int]:
    return (0, 0) if mask is None else mask.stride()


def running_max_variants(temperature: float | Tensor) -> tuple[bool, ...]:
    """The variants of a softmax to launch, True for the one with a running maximum.

    A temperature on the device is not read: both are launched, and one of them returns at once.
    """
    return (False, True) if isinstance(temperature, Tensor) else (temperature < RUNNING_MAX_BELOW,)


def float32_precision() -> str:
    """How products of float32 are computed: in one tf32 product where torch's own setting allows it, else in three."""
    if torch.version.hip is not None:
        return "ieee"
    if hasattr(
        torch.backends.cuda.matmul, "fp32_precision"
    ):  # torch 2.9; once it is set, the older setting is an error
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
