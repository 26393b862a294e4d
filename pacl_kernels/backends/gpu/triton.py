"""The two fused functions in Triton, for every GPU that it supports.

`call` orders the launches, `cosine` has those of the cosine form, `run` what all of them share,
`tiles` the tables of tiles, and `kernels` the kernels.

Forward: the inverse norms, then one persistent product whose epilogue sums the softmax. Backward: for blocks of images,
the product again with an epilogue that writes W `[texts, rows]` into a workspace of fixed size, then ∂P = Wᵀ T and
∂T += W P as the library's products, and the projection that takes the norms into account. No atomics: the result is
deterministic. With TRITON_INTERPRET=1 set before triton is imported, the same kernels run on CPU tensors.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata

import torch
from torch import Tensor

from ...reference import LARGEST_SCORE
from . import run as launch
from . import tiles
from .call import Call

_MIN_TRITON = (3, 3)


def why_not(device: torch.device | None = None, dtype: torch.dtype | None = None) -> str | None:
    version = _triton_version()
    if version is None:
        return "triton is not installed; `pip install triton`"
    if version < _MIN_TRITON:
        return f"triton is {'.'.join(map(str, version))}, expected at least {'.'.join(map(str, _MIN_TRITON))}"
    if dtype is not None and dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 and float16, not {dtype}"
    if tiles.interpreted():
        return None
    if device is not None and device.type != "cuda":
        return f"it takes tensors on a GPU, not on {device.type} (unless TRITON_INTERPRET=1, which is slow)"
    if not torch.cuda.is_available():
        return "torch finds no GPU (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
    index = device if device is not None else torch.device("cuda", torch.cuda.current_device())
    if torch.version.hip is None and torch.cuda.get_device_capability(index) < (8, 0):
        return f"{torch.cuda.get_device_name(index)} is older than compute capability 8.0"
    return None


@functools.cache
def _triton_version() -> tuple[int, ...] | None:
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return tuple(int(part) for part in importlib.metadata.version(name).split(".")[:2])
    return None


def compatibility_forward(patches, texts, patch_mask, temperature, form, phi, state) -> None:
    forward(Call, patches, texts, patch_mask, temperature, form, phi, state)


def forward(kind: type[Call], patches, texts, patch_mask, temperature, form, phi, state) -> None:
    """`kind`: whose launches are made, this backend's or those of one that is built on it."""
    if not phi.numel():
        return
    with launch.on_device(patches):
        kind(patches, texts, patch_mask, temperature, phi, state).forward(form)


def compatibility_backward(
    patches, texts, patch_mask, temperature, form, phi, state, grad_phi, grad_patches, grad_texts, grad_temperature
) -> None:
    gradients = (grad_phi, grad_patches, grad_texts, grad_temperature)
    backward(Call, patches, texts, patch_mask, temperature, form, phi, state, gradients)


def backward(kind: type[Call], patches, texts, patch_mask, temperature, form, phi, state, gradients) -> None:
    with launch.on_device(patches):
        kind(patches, texts, patch_mask, temperature, phi, state).backward(form, *gradients)


def loss_forward(phi: Tensor, scale, bias, loss: str, value: Tensor, statistics: Tensor | None) -> None:
    """Write the loss of φ `[B, B]`; for InfoNCE also `statistics` `[4, B]`, maximum and log-sum of rows and columns."""
    b = len(phi)
    with launch.on_device(phi):
        constants = _loss_constants(scale, bias)
        if loss == "sigmoid":
            sums = phi.new_empty(tiles.ceil_div(b, constants["ROWS"]))
            arguments = (phi, scale, bias, sums, b)
            launch.run(launch.kernels().sigmoid_loss_kernel, len(sums), arguments, constants, fused=False)
            value.copy_(sums.sum() / b)
            return
        row_largest, row_log, column_largest, column_log = statistics
        arguments = (phi, scale, bias, row_largest, row_log, b, b, b, 1)
        # The pair's logit is subtracted below: all are rounded alike.
        rows = tiles.ceil_div(b, constants["ROWS"])
        launch.run(launch.kernels().shifted_logsumexp_kernel, rows, arguments, constants, fused=False)
        # A column's neighbours in memory are other columns, so a program takes 32 of them.
        arguments, constants = (phi, scale, bias, column_largest, column_log, b, b, 1, b), constants | _COLUMN_TILE
        columns = tiles.ceil_div(b, constants["ROWS"])
        launch.run(launch.kernels().shifted_logsumexp_kernel, columns, arguments, constants, fused=False)
        pair = phi.diagonal() * scale
        if bias is not None:
            pair = pair + bias
        value.copy_(((row_largest - pair + row_log).mean() + (column_largest - pair + column_log).mean()) / 2)


def loss_backward(phi, scale, bias, loss: str, statistics, grad_loss, grad_phi, grad_scale, grad_bias) -> None:
    """Write ∂L/∂φ `[B, B]` and, 0-D, the gradients of logit scale and bias."""
    with launch.on_device(phi):
        constants = _loss_constants(scale, bias)
        programs = tiles.ceil_div(len(phi), constants["ROWS"])
        sums = phi.new_empty(2, programs)
        statistics = (None,) * 4 if statistics is None else tuple(statistics)
        arguments = (phi, scale, bias, *statistics, grad_loss, grad_phi, *sums, len(phi))
        launch.run(
            *(launch.kernels().loss_backward_kernel, programs, arguments, constants | dict(SIGMOID=loss == "sigmoid")),
            stages=2,
            fused=False,
        )
        for grad, parts in zip((grad_scale, grad_bias), sums, strict=True):
            if grad is not None:
                grad.copy_(parts.sum())


def upsample_argmax(scores, rows, columns, scale, labels, best, entropy) -> None:
    """As `backends/blockwise.py` says; a program takes a block of an image's pixels."""
    with launch.on_device(scores):
        arguments = (scores, *rows, *columns, scale, labels, best, entropy)
        arguments += (*scores.shape[1:], *labels.shape[1:], *scores.stride())
        constants = dict(SCALE_IS_TENSOR=isinstance(scale, Tensor), LARGEST=LARGEST_SCORE, BLOCK=_PIXELS)
        programs = len(scores) * tiles.ceil_div(labels[0].numel(), _PIXELS)
        launch.run(launch.kernels().upsample_argmax_kernel, programs, arguments, constants)


_PIXELS = 512
_ROW_TILE = dict(ROWS=4, BLOCK=512)
_COLUMN_TILE = dict(ROWS=32, BLOCK=64)


def _loss_constants(scale, bias) -> dict:
    return _ROW_TILE | dict(SCALE_IS_TENSOR=isinstance(scale, Tensor), BIAS_IS_TENSOR=isinstance(bias, Tensor))
