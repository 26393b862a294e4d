"""The backends: the interface of one (`Backend`), and the choice of the one that runs."""

from __future__ import annotations

import os
import warnings
from typing import Protocol, get_args

import torch
from torch import Tensor

from ..checks import NORMALIZE as ALL
from ..checks import BackendName, Scalar
from ..tolerance import KeptPairs
from . import blockwise, cpu
from .gpu import hopper, triton


class Backend(Protocol):
    """Functions of a backend, a module or an object; they write into buffers that the caller allocated.

    All tensors are on one device. `patches` `[B, N, D]` and `texts` `[K, D]` have one dtype and any strides,
    `patch_mask` is bool `[B, N]` or None. φ, the state and ∂L/∂φ are contiguous `[B, K]`, float32 (float64 for float64
    inputs); the loss and the gradients of scalars are 0-D and of the same dtype. A scalar is a number or a 0-D tensor
    of that dtype. Gradients whose buffer is None are not computed. The operators answer for an empty side themselves:
    no backend is called with B or K of 0.
    """

    def why_not(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> str | None:
        """Return None if the backend can run, otherwise one sentence that says what is missing and how to get it."""

    def compatibility_forward(
        self, patches: Tensor, texts: Tensor, patch_mask: Tensor | None, temperature: Scalar, form: str,
        phi: Tensor, state: Tensor,
    ) -> None:  # fmt: skip
        """Write φ, and the state that the backward also needs."""

    def compatibility_backward(
        self, patches: Tensor, texts: Tensor, patch_mask: Tensor | None, temperature: Scalar, form: str,
        phi: Tensor, state: Tensor, grad_phi: Tensor,
        grad_patches: Tensor | None, grad_texts: Tensor | None, grad_temperature: Tensor | None,
    ) -> KeptPairs | None:  # fmt: skip
        """Write the gradients from ∂L/∂φ: `[B, N, D]`, `[K, D]` (float32 or the texts' dtype) and 0-D.

        Return what was kept if pairs were left out, see `drops_pairs`.
        """

    def loss_forward(
        self, phi: Tensor, scale: Scalar, bias: Scalar | None, loss: str, value: Tensor, statistics: Tensor | None
    ) -> None:
        """Write the loss (0-D) of φ `[B, B]`, and for InfoNCE the statistics `[4, B]` that its backward needs."""

    def loss_backward(
        self, phi: Tensor, scale: Scalar, bias: Scalar | None, loss: str, statistics: Tensor | None, grad_loss: Tensor,
        grad_phi: Tensor, grad_scale: Tensor | None, grad_bias: Tensor | None,
    ) -> None:  # fmt: skip
        """Write ∂L/∂φ and the gradients of logit scale and bias."""

    def upsample_argmax(
        self, scores: Tensor, rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor], scale: Scalar,
        labels: Tensor, best: Tensor | None, entropy: Tensor | None,
    ) -> None:  # fmt: skip
        """Write labels int16 `[B, H, W]`, best scores and entropies of scores `[B, C, h, w]`.

        `rows` and `columns`: for each output row (column) the source index before it and the fraction, see
        `ops._positions`.
        """


_BACKENDS: dict[str, Backend] = {"cuda": hopper, "triton": triton, "cpu": cpu, "torch": blockwise}
NAMES: tuple[str, ...] = get_args(BackendName)
_NORMALIZE = {"cpu": ("both", "none"), "triton": ("both",), "cuda": ("both",)}  # the others have all choices


def available_backends() -> dict[str, str | None]:
    """Map each backend's name to None if it can run on this machine, otherwise to the reason why not.

    `python -m pacl_kernels` prints the map.
    """
    return {name: backend.why_not() for name, backend in _BACKENDS.items()} | {"reference": None}


def resolve(backend: str, device: torch.device, dtype: torch.dtype, normalize: str = "both") -> str:
    """Return the backend to run: `backend` itself, or for `"auto"` that of `PACL_BACKEND`, or the fastest that can run.

    `normalize`: as in `fused_pacl_loss`. Raises ValueError if the requested backend is unknown or cannot run on this
    device and dtype.
    """
    if backend == "auto":
        backend = os.environ.get("PACL_BACKEND", "auto")
    if backend not in NAMES:
        raise ValueError(f"backend is {backend!r}, expected one of {', '.join(map(repr, NAMES))}")
    if backend == "auto":
        best = _best(device, dtype)
        return best if normalize in _NORMALIZE.get(best, ALL) else "torch"
    if backend == "reference":
        return backend
    if normalize not in _NORMALIZE.get(backend, ALL):
        raise ValueError(f"backend is {backend!r}, expected 'auto' or 'torch' for normalize={normalize!r}")
    reason = _BACKENDS[backend].why_not(device, dtype)
    if reason is not None:
        raise ValueError(f"backend {backend!r} cannot run here: {reason}")
    return backend


# The compiler evaluates `resolve` while it traces, warning included. This is what torch.compiler.assume_constant_result
# sets; the decorator itself would import the compiler, 1.7 s, into every program that imports this package.
resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


def get(name: str) -> Backend:
    return _BACKENDS[name]


_able: set[tuple[str, torch.device, torch.dtype]] = set()


def get_for(name: str, x: Tensor) -> Backend:
    """Return the backend `name`, checked for the device and dtype of `x`.

    The public functions choose a backend for their tensors, but a program of `torch.export` keeps the choice, and may
    be moved to another device. Raises ValueError where the backend cannot run.
    """
    key = name, x.device, x.dtype
    if key not in _able:
        resolve(name, *key[1:])
        _able.add(key)
    return _BACKENDS[name]


def _best(device: torch.device, dtype: torch.dtype) -> str:
    if dtype == torch.float64:
        return "torch"  # the only backend with 53 bits
    if device.type == "meta":
        return "torch"  # nothing runs: meta tensors have shapes only
    if device.type == "cuda" and hopper.why_not(device, dtype) is None:
        return "cuda"
    best = "cpu" if device.type == "cpu" else "triton"
    reason = _BACKENDS[best].why_not(device, dtype)
    if reason is None:
        return best
    warn_once(f"pacl_kernels runs its blockwise PyTorch backend, several times slower than {best!r}: {reason}")
    return "torch"


def keeps_scores(backend: str, form: str, dtype: torch.dtype) -> bool:
    """Return True if the backend can keep scores for its backward in the memory of the patches' gradient.

    Its functions then take `scores` and `keeps_scores`, as the operators do.
    """
    return backend == "cpu" and cpu.keeps_scores(form, dtype)


def takes_packed_patches(backend: str, form: str, lists: bool = False) -> bool:
    """Return True if the backend takes `patch_lengths`: patches are then `[ΣN, D]` and the mask is `[ΣN]`.

    `lists`: together with `text_index`.
    """
    if lists:
        return backend == "cpu"
    return backend in ("cpu", "triton") or backend == "cuda" and hopper.takes_packed_patches(form)


def drops_pairs(backend: str) -> bool:
    """Return True if the backward of the backend takes `grad_tolerance` and returns `KeptPairs`, or None for all."""
    return backend in ("cpu", "triton", "cuda")


def takes_lists(backend: str, normalize: str) -> bool:
    """Return True if the backend takes `text_index`, int64 `[B, M]` in range or -1; φ is then `[B, M]`."""
    return backend == "torch" or backend in ("cpu", "triton", "cuda") and normalize == "both"


def computes_sigmoid_step(backend: str, form: str, dtype: torch.dtype, n: int | None) -> bool:
    """Return True if the backend has a `sigmoid_step`: the sigmoid loss and its gradients in one pass over the pairs.

    `n`: patches of an image, all of which a GPU's tile must hold; None for packed patches.
    Not for float16: such gradients are made before the incoming one is known, and a GradScaler would save none of them.
    """
    if form == "max" or dtype not in (torch.float32, torch.bfloat16):
        return False
    if n is None:
        return backend == "cpu"
    if backend == "cuda":
        return dtype == torch.bfloat16 and hopper.fits_sigmoid(n)
    return backend == "cpu" or (backend == "triton" and triton.fits_sigmoid(form, n))


_warned: set[str] = set()


def warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=2)
