"""The fused functions as `torch.library` operators, so that `torch.compile` takes them whole.

They write into buffers that the caller allocated and return nothing: the fake implementations then have nothing to say.
They carry no autograd formula; `PaclFunction` is the only one that differentiates.
"""

from __future__ import annotations

from typing import Optional  # torch.library reads the annotations below and knows no `Tensor | None` before torch 2.8

import torch
from torch import Tensor

from . import backends


@torch.library.custom_op("pacl_kernels::compatibility_forward", mutates_args=("phi", "state"))
def compatibility_forward(
    patches: Tensor,
    texts: Tensor,
    patch_mask: Optional[Tensor],  # noqa: UP045
    temperature: Optional[Tensor],  # noqa: UP045
    temperature_value: float,
    form: str,
    backend: str,
    phi: Tensor,
    state: Tensor,
) -> None:
    """Compatibility φ `[B, K]`, and in `state` `[B, K]` what the same backend's backward needs beside it.

    That is the log-sum-exp over patches of s / τ, or for form "max" the index n of the winning patch (exact in float32
    for N < 2**24), -1 for an image without a patch. Callers hand it on and do not read it.

    `patches` `[B, N, D]`, `texts` `[K, D]`, `patch_mask` bool `[B, N]`; τ is the one-element tensor `temperature`, or
    `temperature_value` where that is None.
    """
    tau = temperature_value if temperature is None else temperature.to(phi.dtype).reshape(())
    # An operator runs inside the caller's autocast region, which would cast the backend's own products once more.
    with torch.autocast(patches.device.type, enabled=False):
        backends.module(backend).compatibility_forward(patches, texts, patch_mask, tau, form, phi, state)


@compatibility_forward.register_fake
def _(patches, texts, patch_mask, temperature, temperature_value, form, backend, phi, state):
    return None


@torch.library.custom_op(
    "pacl_kernels::compatibility_backward", mutates_args=("grad_patches", "grad_texts", "grad_temperature")
)
def compatibility_backward(
    patches: Tensor,
    texts: Tensor,
    patch_mask: Optional[Tensor],  # noqa: UP045
    temperature: Optional[Tensor],  # noqa: UP045
    temperature_value: float,
    form: str,
    backend: str,
    phi: Tensor,
    state: Tensor,
    grad_phi: Tensor,
    grad_patches: Optional[Tensor],  # noqa: UP045
    grad_texts: Optional[Tensor],  # noqa: UP045
    grad_temperature: Optional[Tensor],  # noqa: UP045
) -> None:
    """Gradients from ∂L/∂φ `[B, K]`, into those buffers that are given: like patches, like texts, and 0-D.

    That of the texts may be float32 whatever they are.
    """
    if not phi.numel():
        for grad in (grad_patches, grad_texts, grad_temperature):
            if grad is not None:
                grad.zero_()
        return
    tau = temperature_value if temperature is None else temperature.to(phi.dtype).reshape(())
    with torch.autocast(patches.device.type, enabled=False):
        backends.module(backend).compatibility_backward(
            patches, texts, patch_mask, tau, form, phi, state, grad_phi, grad_patches, grad_texts, grad_temperature
        )


@compatibility_backward.register_fake
def _(patches, texts, patch_mask, temperature, temperature_value, form, backend, phi, state, grad_phi, *grads):
    return None


@torch.library.custom_op("pacl_kernels::loss_forward", mutates_args=("value", "statistics"))
def loss_forward(
    phi: Tensor,
    scale: Optional[Tensor],  # noqa: UP045
    scale_value: float,
    bias: Optional[Tensor],  # noqa: UP045
    bias_value: Optional[float],  # noqa: UP045
    loss: str,
    backend: str,
    value: Tensor,
    statistics: Optional[Tensor],  # noqa: UP045
) -> None:
    """The loss (0-D) of φ `[B, B]`, and for InfoNCE what its backward needs, `[4, B]`; only where a backend fuses it.

    A scalar is its one-element tensor or, where that is None, its value; a bias may be neither.
    """
    scale, bias = _scalar(scale, scale_value, phi), _scalar(bias, bias_value, phi)
    backends.module(backend).loss_forward(phi, scale, bias, loss, value, statistics)


@loss_forward.register_fake
def _(phi, scale, scale_value, bias, bias_value, loss, backend, value, statistics):
    return None


@torch.library.custom_op("pacl_kernels::loss_backward", mutates_args=("grad_phi", "grad_scale", "grad_bias"))
def loss_backward(
    phi: Tensor,
    scale: Optional[Tensor],  # noqa: UP045
    scale_value: float,
    bias: Optional[Tensor],  # noqa: UP045
    bias_value: Optional[float],  # noqa: UP045
    loss: str,
    backend: str,
    statistics: Optional[Tensor],  # noqa: UP045
    grad_loss: Tensor,
    grad_phi: Tensor,
    grad_scale: Tensor,
    grad_bias: Tensor,
) -> None:
    """∂L/∂φ `[B, B]` and the gradients of logit scale and bias (0-D), times `grad_loss`."""
    scale, bias = _scalar(scale, scale_value, phi), _scalar(bias, bias_value, phi)
    backends.module(backend).loss_backward(
        phi, scale, bias, loss, statistics, grad_loss, grad_phi, grad_scale, grad_bias
    )


@loss_backward.register_fake
def _(phi, scale, scale_value, bias, bias_value, loss, backend, statistics, grad_loss, grad_phi, *grads):
    return None


@torch.library.custom_op("pacl_kernels::upsample_argmax", mutates_args=("labels", "best", "entropy"))
def upsample_argmax(
    scores: Tensor,
    align_corners: bool,
    scale: Optional[Tensor],  # noqa: UP045
    scale_value: float,
    backend: str,
    labels: Tensor,
    best: Optional[Tensor],  # noqa: UP045
    entropy: Optional[Tensor],  # noqa: UP045
) -> None:
    """Labels (int16), and into those buffers that are given best score and entropy, `[B, H, W]`, of `[B, C, h, w]`."""
    if not labels.numel():
        return
    wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
    rows, columns = (
        _positions(source, size, align_corners, scores.device, wide)
        for source, size in zip(scores.shape[2:], labels.shape[1:], strict=True)
    )
    scale = scale_value if scale is None else scale.to(wide).reshape(())
    backends.module(backend).upsample_argmax(scores, rows, columns, scale, labels, best, entropy)


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


def _scalar(tensor, value, like: Tensor):
    return value if tensor is None else tensor.to(like.dtype).reshape(())
