"""Which implementation of the two fused functions runs.

A backend is a module with `why_not(device, dtype) -> str | None` (None: it can; otherwise one sentence that says what
is missing and how to get it), `compatibility_forward`, `compatibility_backward` and `upsample_argmax`, see
`blockwise.py`. It may have `loss_forward` and `loss_backward` as well, see `gpu/triton.py`.
"""

from __future__ import annotations

import os
import warnings
from types import ModuleType

import torch

from . import blockwise, cpu
from .gpu import hopper, triton

_MODULES: dict[str, ModuleType] = {"cuda": hopper, "triton": triton, "cpu": cpu, "torch": blockwise}
NAMES = ("auto", *_MODULES, "reference")


def available_backends() -> dict[str, str | None]:
    """Backend name to None if it can run on this machine, otherwise to the reason why not."""
    return {name: module.why_not() for name, module in _MODULES.items()} | {"reference": None}


def resolve(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The name of the backend to run: `backend` itself, or for `"auto"` what `PACL_BACKEND` says or the best there is.

    Raises ValueError if the one asked for is unknown or cannot run on this device and dtype.
    """
    if backend == "auto":
        backend = os.environ.get("PACL_BACKEND", "auto")
    if backend not in NAMES:
        raise ValueError(f"backend is {backend!r}, expected one of {', '.join(map(repr, NAMES))}")
    if backend == "auto":
        return _best(device, dtype)
    if backend == "reference":
        return backend
    reason = _MODULES[backend].why_not(device, dtype)
    if reason is not None:
        raise ValueError(f"backend {backend!r} cannot run here: {reason}")
    return backend


# What torch.compiler.assume_constant_result sets: decided while tracing, warning included. The decorator itself would
# import the compiler, 1.7 s, into every program that imports this package.
resolve._dynamo_marked_constant = True


def module(name: str) -> ModuleType:
    return _MODULES[name]


def fuses_loss(name: str) -> bool:
    """Whether the backend has kernels of its own for the loss over `[B, K]`, `loss_forward` and `loss_backward`."""
    return hasattr(_MODULES[name], "loss_forward")


def _best(device: torch.device, dtype: torch.dtype) -> str:
    if dtype == torch.float64:
        return "torch"  # the only one that keeps 53 bits
    if device.type == "meta":
        return "torch"  # nothing runs: there are shapes only
    if device.type == "cuda" and hopper.why_not(device, dtype) is None:
        return "cuda"
    best = "cpu" if device.type == "cpu" else "triton"
    reason = _MODULES[best].why_not(device, dtype)
    if reason is None:
        return best
    warn_once(f"pacl_kernels runs its blockwise PyTorch backend, several times slower than {best!r}: {reason}")
    return "torch"


_warned: set[str] = set()


def warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=2)
