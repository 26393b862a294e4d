"""The kernels as `torch.library` operators, so that `torch.compile` takes the functions whole.

They write into buffers that the caller allocated and return nothing: the fake implementations then have nothing to say.
They carry no autograd formula; the Functions of `autograd.py` differentiate. A scalar of the public functions is two
arguments of an operator, which `pair` makes of it: its tensor of one element or None, and its value.
"""

from __future__ import annotations

import contextlib
from typing import Optional

import torch
from torch import Tensor

from . import backends
from .checks import autocasts
from .contrastive import Scalar, scalar

OptionalTensor = Optional[Tensor]  # noqa: UP045  (torch.library knows no `Tensor | None` before torch 2.8)
OptionalFloat = Optional[float]  # noqa: UP045


def pair(value: Scalar | None) -> tuple[Tensor | None, float | None]:
    """A scalar as operators take it: its tensor and None, or None and its value (None for None)."""
    return (value, None) if isinstance(value, Tensor) else (None, value)


def _without_autocast(device: torch.device):
    """Autocast of the caller's region must not cast a backend's own products once more."""
    return torch.autocast(device.type, enabled=False) if autocasts(device.type) else contextlib.nullcontext()


@torch.library.custom_op("pacl_kernels::compatibility_forward", mutates_args=("phi", "state"))
def compatibility_forward(
    patches: Tensor,
    texts: Tensor,
    patch_mask: OptionalTensor,
    temperature: OptionalTensor,
    temperature_value: OptionalFloat,
    form: str,
    backend: str,
    phi: Tensor,
    state: Tensor,
) -> None:
    """Writes compatibility φ `[B, K]` and `state` `[B, K]`, which the same backend's backward reads.

    `patches` `[B, N, D]`, `texts` `[K, D]`, `patch_mask` bool `[B, N]`. The state is the log-sum-exp over patches of
    s / τ or another number from which the backend makes the attention again. For form "max" it is the index n of the
    winning patch (exact in float32 for N < 2**24), -1 for an image without a patch.
    """
    if phi.numel():
        tau = scalar(temperature_value if temperature is None else temperature, phi.dtype)
        with _without_autocast(patches.device):
            backends.get(backend).compatibility_forward(patches, texts, patch_mask, tau, form, phi, state)


@compatibility_forward.register_fake
def _(patches, texts, patch_mask, temperature, temperature_value, form, backend, phi, state):
    return None


@torch.library.custom_op(
    "pacl_kernels::compatibility_backward", mutates_args=("grad_patches", "grad_texts", "grad_temperature")
)
def compatibility_backward(
    patches: Tensor,
    texts: Tensor,
    patch_mask: OptionalTensor,
    temperature: OptionalTensor,
    temperature_value: OptionalFloat,
    form: str,
    backend: str,
    phi: Tensor,
    state: Tensor,
    grad_phi: Tensor,
    grad_patches: OptionalTensor,
    grad_texts: OptionalTensor,
    grad_temperature: OptionalTensor,
) -> None:
    """Writes gradients from ∂L/∂φ `[B, K]` into those buffers that are given: like patches, like texts, and 0-D.

    The texts' gradient may be float32 whatever their dtype.
    """
    if not phi.numel():
        for grad in (grad_patches, grad_texts, grad_temperature):
            if grad is not None:
                grad.zero_()
        return
    tau = scalar(temperature_value if temperature is None else temperature, phi.dtype)
    with _without_autocast(patches.device):
        backends.get(backend).compatibility_backward(
            *(patches, texts, patch_mask, tau, form, phi, state),
            *(grad_phi, grad_patches, grad_texts, grad_temperature),
        )


@compatibility_backward.register_fake
def _(patches, texts, patch_mask, temperature, temperature_value, form, backend, phi, state, grad_phi, *grads):
    return None


@torch.library.custom_op("pacl_kernels::loss_forward", mutates_args=("value", "statistics"))
def loss_forward(
    phi: Tensor,
    scale: OptionalTensor,
    scale_value: OptionalFloat,
    bias: OptionalTensor,
    bias_value: OptionalFloat,
    loss: str,
    backend: str,
    value: Tensor,
    statistics: OptionalTensor,
) -> None:
    """Writes the loss (0-D) of φ `[B, B]`, and for InfoNCE what its backward needs, `[4, B]`."""
    scale, bias = (
        scalar(scale_value if scale is None else scale, phi.dtype),
        scalar(bias_value if bias is None else bias, phi.dtype),
    )
    with _without_autocast(phi.device):
        backends.get(backend).loss_forward(phi, scale, bias, loss, value, statistics)


@loss_forward.register_fake
def _(phi, scale, scale_value, bias, bias_value, loss, backend, value, statistics):
    return None


@torch.library.custom_op("pacl_kernels::loss_backward", mutates_args=("grad_phi", "grad_scale", "grad_bias"))
def loss_backward(
    phi: Tensor,
    scale: OptionalTensor,
    scale_value: OptionalFloat,
    bias: OptionalTensor,
    bias_value: OptionalFloat,
    loss: str,
    backend: str,
    statistics: OptionalTensor,
    grad_loss: Tensor,
    grad_phi: Tensor,
    grad_scale: OptionalTensor,
    grad_bias: OptionalTensor,
) -> None:
    """Writes ∂L/∂φ `[B, B]` and, where buffers are given, the gradients of logit scale and bias (0-D)."""
    scale, bias = (
        scalar(scale_value if scale is None else scale, phi.dtype),
        scalar(bias_value if bias is None else bias, phi.dtype),
    )
    with _without_autocast(phi.device):
        backends.get(backend).loss_backward(
            phi, scale, bias, loss, statistics, grad_loss, grad_phi, grad_scale, grad_bias
        )
        if grad_bias is not None and loss == "infonce":
            grad_bias.mul_(0.0)  # the loss does not depend on it: the sum is rounding, or NaN


@loss_backward.register_fake
def _(phi, scale, scale_value, bias, bias_value, loss, backend, statistics, grad_loss, grad_phi, *grads):
    return None


@torch.library.custom_op("pacl_kernels::upsample_argmax", mutates_args=("labels", "best", "entropy"))
def upsample_argmax(
    scores: Tensor,
    align_corners: bool,
    scale: OptionalTensor,
    scale_value: OptionalFloat,
    backend: str,
    labels: Tensor,
    best: OptionalTensor,
    entropy: OptionalTensor,
) -> None:
    """Writes labels (int16) of `[B, C, h, w]`, and best score and entropy where buffers are given, `[B, H, W]` each."""
    if not labels.numel():
        return
    wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
    rows, columns = (
        _positions(source, size, align_corners, scores.device, wide)
        for source, size in zip(scores.shape[2:], labels.shape[1:], strict=True)
    )
    scale = scalar(scale_value if scale is None else scale, wide)
    backends.get(backend).upsample_argmax(scores, rows, columns, scale, labels, best, entropy)


@upsample_argmax.register_fake
def _(scores, align_corners, scale, scale_value, backend, labels, best, entropy):
    return None


def _positions(source: int, size: int, align_corners: bool, device, dtype) -> tuple[Tensor, Tensor]:
    """For each of `size` pixels the element of `source` before it (int32) and how far it is to the next one, in [0, 1).

    In integers, so exact: a float32 coordinate would be off by 1e-5 in the middle of a large picture.
    """
    pixels = torch.arange(size, device=device)
    if align_corners:
        above, below = pixels * (source - 1), max(size - 1, 1)
    else:
        above, below = ((2 * pixels + 1) * source - size).clamp_min(0), 2 * size
    return (above // below).int(), (above % below).to(dtype) / below
