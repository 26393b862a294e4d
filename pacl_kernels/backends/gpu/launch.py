"""Helpers for launches of Triton's kernels, and facts about the device."""

from __future__ import annotations

import contextlib
import functools
import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...constants import RUNNING_MAX_BELOW

Constants = dict[str, Any]  # compile-time arguments of a kernel by name

_INTERPRETER_PROGRAMS = 3  # fewer than items, so that programs loop in the interpreter as on a GPU


@functools.cache
def kernels() -> ModuleType:
    """Import the package of the kernels, which imports triton, when the first kernel is needed."""
    return importlib.import_module(".kernels", __package__)


def run(
    kernel: Any, programs: int, arguments: tuple[Any, ...], constants: Constants,
    warps: int = 4, stages: int = 3, registers: int = 0, fma: bool = True,
) -> None:  # fmt: skip
    """Launch `programs` programs of a kernel. `fma`: allow FMA contraction."""
    limit = {"maxnreg": registers} if registers else {}  # NVIDIA only
    options = dict(num_warps=warps, num_stages=stages, enable_fp_fusion=fma)
    kernel[(programs,)](*arguments, **constants, **options, **limit)


def programs(device: torch.device, per_processor: int) -> int:
    return _INTERPRETER_PROGRAMS if device.type == "cpu" else processors(device) * per_processor


@functools.cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the device of `x` the current one, on which Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def mask_strides(mask: Tensor | None) -> tuple[int, int]:
    return (0, 0) if mask is None else (mask.stride(0), mask.stride(1))


def running_max_variants(temperature: float | Tensor) -> tuple[bool, ...]:
    """Return the variants of a softmax to launch, True for the one with a running maximum.

    The host never reads a temperature on the device: both variants are launched, and one of them returns at once.
    """
    return (False, True) if isinstance(temperature, Tensor) else (temperature < RUNNING_MAX_BELOW,)


def float32_precision() -> str:
    """Return the precision of float32 products: one tf32 product if torch's own setting allows it, otherwise three."""
    if torch.version.hip is not None:
        return "ieee"
    # torch 2.9 and later; once this is set, reading the older setting is an error.
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
