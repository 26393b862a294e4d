"""The autograd Functions: buffers, the operators, and the loss over `[B, K]` with its gradient.

They check nothing (`loss.py` does) and keep no more than four `[B, K]` arrays alive at a time, three where the backend
fuses the loss (φ, what the backward needs beside it, and ∂L/∂φ).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from . import dispatch, ops

Scalar = float | Tensor


class _NoSecondOrder(torch.autograd.Function):
    """Passes a gradient through, tied to the tensors it depends on, and refuses to be differentiated."""

    @staticmethod
    def forward(ctx, grad, *sources):
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("the PACL loss cannot be differentiated twice: only its first derivative is supported")


def _first_order(backward):
    """`once_differentiable`, which lets pass unnoticed a gradient that depends on saved tensors alone (a penalty)."""

    @functools.wraps(backward)
    def wrapper(ctx, grad):
        with torch.no_grad():
            grads = backward(ctx, grad)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return grads
        sources = [tensor for tensor in (grad, *ctx.saved_tensors) if tensor is not None and tensor.requires_grad]
        return tuple(None if grad is None else _NoSecondOrder.apply(grad, *sources) for grad in grads)

    return wrapper


class CompatibilityFunction(torch.autograd.Function):
    """φ `[B, K]` of patches `[B, N, D]` and texts `[K, D]`, float32 (float64 for float64 inputs)."""

    @staticmethod
    def forward(ctx, patches, texts, temperature, patch_mask, form, backend):
        inputs, ctx.options = _operator_arguments(patches, texts, patch_mask, temperature, form, backend)
        phi, lse = _score(inputs, ctx.options)
        ctx.save_for_backward(*inputs, phi, lse)
        return phi

    @staticmethod
    @_first_order
    def backward(ctx, grad_phi):
        *inputs, phi, lse = ctx.saved_tensors
        needs = ctx.needs_input_grad
        grads = _score_gradients(inputs, ctx.options, phi, lse, grad_phi.contiguous(), needs[0], needs[1], needs[2])
        return *grads, None, None, None


class PaclFunction(torch.autograd.Function):
    """The loss (0-D) of φ; gradients for patches, texts, logit scale, logit bias and temperature."""

    @staticmethod
    def forward(ctx, patches, texts, logit_scale, logit_bias, temperature, patch_mask, form, loss, backend):
        inputs, ctx.options = _operator_arguments(patches, texts, patch_mask, temperature, form, backend)
        phi, lse = _score(inputs, ctx.options)
        ctx.loss = loss
        scale, ctx.scale = _tensor_or_number(logit_scale)
        bias, ctx.bias = _tensor_or_number(logit_bias)
        if dispatch.fuses_loss(backend):
            value = phi.new_empty(())
            statistics = (phi.new_empty(4, len(phi)),) if loss == "infonce" else ()
            scalars = scale, ctx.scale or 0.0, bias, ctx.bias
            ops.loss_forward(phi, *scalars, loss, backend, value, *(statistics or (None,)))
        else:
            value, statistics = _LOSSES[loss][0](_logits(phi, logit_scale, logit_bias))
        ctx.save_for_backward(*inputs, phi, lse, scale, bias, *statistics)
        return value

    @staticmethod
    @_first_order
    def backward(ctx, grad_loss):
        *inputs, phi, lse, scale, bias = ctx.saved_tensors[:8]
        statistics = ctx.saved_tensors[8:]
        needs = ctx.needs_input_grad
        if dispatch.fuses_loss(ctx.options[-1]):
            grad_phi, grad_scale, grad_bias = torch.empty_like(phi), phi.new_empty(()), phi.new_empty(())
            scalars = scale, ctx.scale or 0.0, bias, ctx.bias
            ops.loss_backward(
                *(phi, *scalars, ctx.loss, ctx.options[-1], *(statistics or (None,))),
                *(grad_loss, grad_phi, grad_scale, grad_bias),
            )
        else:
            number_or_tensor = ctx.scale if scale is None else scale, ctx.bias if bias is None else bias
            grad_logits = _LOSSES[ctx.loss][1](_logits(phi, *number_or_tensor), *statistics).mul_(grad_loss)
            grad_scale = (grad_logits * phi).sum() if needs[2] else None
            grad_bias = grad_logits.sum() if needs[3] else None
            grad_phi = grad_logits.mul_(_as(number_or_tensor[0], phi))
        if grad_bias is not None and ctx.loss == "infonce":
            grad_bias.mul_(0.0)  # the loss does not depend on it: the sum is rounding, or NaN
        grad_scale = grad_scale.to(scale.dtype).reshape(scale.shape) if needs[2] else None
        grad_bias = grad_bias.to(bias.dtype).reshape(bias.shape) if needs[3] else None
        grad_patches, grad_texts, grad_temperature = _score_gradients(
            inputs, ctx.options, phi, lse, grad_phi, needs[0], needs[1], needs[4]
        )
        return grad_patches, grad_texts, grad_scale, grad_bias, grad_temperature, None, None, None, None


def _tensor_or_number(value: Scalar | None) -> tuple[Tensor | None, float | None]:
    return (value, None) if isinstance(value, Tensor) else (None, value)


def _operator_arguments(patches, texts, patch_mask, temperature, form, backend) -> tuple[tuple, tuple]:
    """What the operators take first: tensors (to be saved), then numbers and names."""
    tensor, number = _tensor_or_number(temperature)
    return (patches, texts, patch_mask, tensor), (1.0 if number is None else number, form, backend)


def _score(inputs, options) -> tuple[Tensor, Tensor]:
    patches, texts = inputs[:2]
    dtype = torch.float64 if patches.dtype == torch.float64 else torch.float32
    phi = patches.new_empty(patches.shape[0], texts.shape[0], dtype=dtype)
    lse = torch.empty_like(phi)
    ops.score_forward(*inputs, *options, phi, lse)
    return phi, lse


def _score_gradients(inputs, options, phi, lse, grad_phi, patches_need, texts_need, temperature_needs):
    patches, texts, _, temperature = inputs
    grad_patches = patches.new_empty(patches.shape) if patches_need else None
    grad_texts = texts.new_empty(texts.shape) if texts_need else None
    grad_temperature = phi.new_empty(()) if temperature_needs else None
    if patches_need or texts_need or temperature_needs:
        ops.score_backward(*inputs, *options, phi, lse, grad_phi, grad_patches, grad_texts, grad_temperature)
    if temperature_needs:
        grad_temperature = grad_temperature.to(temperature.dtype).reshape(temperature.shape)
    return grad_patches, grad_texts, grad_temperature


def _as(value: Scalar, like: Tensor) -> Scalar:
    return value.to(like.dtype) if isinstance(value, Tensor) else value


def _logits(phi: Tensor, scale: Scalar, bias: Scalar | None) -> Tensor:
    logits = phi * _as(scale, phi)
    return logits if bias is None else logits.add_(_as(bias, phi))


def _infonce(logits: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    # Maximum and log-sum apart: their sum would round away a saturated loss (log-sum 1e-6 beside a maximum of 100).
    statistics = [part for dim in (1, 0) for part in _shifted_logsumexp(logits, dim)]
    row_max, row_log, column_max, column_log = statistics
    pair = logits.diagonal()
    return ((row_max - pair + row_log).mean() + (column_max - pair + column_log).mean()) / 2, tuple(statistics)


def _shifted_logsumexp(logits: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    largest = logits.amax(dim)
    return largest, (logits - largest.unsqueeze(dim)).exp_().sum(dim).log_()


def _infonce_gradient(logits, row_max, row_log, column_max, column_log) -> Tensor:
    columns = (logits - column_max).sub_(column_log).exp_()
    grad = logits.sub_(row_max[:, None]).sub_(row_log[:, None]).exp_().add_(columns)
    grad.diagonal().sub_(2.0)
    return grad.div_(2 * len(grad))


def _sigmoid(logits: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    logits.diagonal().neg_()
    return F.softplus(logits).sum() / len(logits), ()


def _sigmoid_gradient(logits: Tensor) -> Tensor:
    logits.diagonal().neg_()
    grad = logits.sigmoid_().div_(len(logits))
    grad.diagonal().neg_()
    return grad


_LOSSES = {"infonce": (_infonce, _infonce_gradient), "sigmoid": (_sigmoid, _sigmoid_gradient)}
