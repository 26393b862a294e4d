"""The autograd Functions: buffers, the operators, and the loss over `[B, K]` with its gradient.

They check nothing (`loss.py` does) and keep no more than four `[B, K]` arrays alive at a time, three where the backend
fuses the loss (φ, what the backward needs beside it, and ∂L/∂φ).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import backends, contrastive, ops

Scalar = float | Tensor


class PerSample(torch.autograd.Function):
    """A Function that `torch.func.vmap` calls once for each sample: the operators fill buffers and know no batches."""

    @classmethod
    def vmap(cls, info, in_dims, *arguments):
        calls = [
            cls.apply(*(x if dim is None else x.select(dim, i) for x, dim in zip(arguments, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        outputs = tuple(None if samples[0] is None else torch.stack(samples) for samples in zip(*calls, strict=True))
        return outputs, tuple(None if output is None else 0 for output in outputs)


def first_output(function: type[PerSample], *arguments):
    """Calls `function` and returns its first output, without those that only its backward needs."""
    if torch.compiler.is_compiling():
        return function.apply(*arguments)[0]
    try:
        return function.apply(*arguments)[0]
    except NotImplementedError as error:
        if torch.autograd.forward_ad._current_level < 0:
            raise
        # PyTorch's own refuses it too, and names nothing. A `jvp` that raises would end torch.compile's fullgraph.
        raise NotImplementedError(
            "a fused function has no derivative in forward mode (jvp, jacfwd, hessian), expected reverse mode (grad, "
            "vjp, jacrev) or backend='reference'"
        ) from error


class _Gradients(PerSample):
    """Runs a backward, ties what it returns to the tensors it depends on, and refuses to be differentiated."""

    @staticmethod
    def forward(compute, grad, *saved):
        return compute(grad, *saved)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            "the PACL loss cannot be differentiated twice: only its first derivative is supported, unless "
            "backend='reference'"
        )


def first_order(backward):
    """`once_differentiable`, which lets pass unnoticed a gradient that depends on saved tensors alone (a penalty).

    `backward` takes ctx, the saved tensors and the gradient of the first output; the others have none.
    """

    @functools.wraps(backward)
    def wrapper(ctx, grad, *_):
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        saved = ctx.saved_tensors  # once: a checkpoint gives them out no second time, hooks would copy them again
        transformed = not torch.compiler.is_compiling() and (
            torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()
        )
        if transformed:
            return _Gradients.apply(lambda grad, *saved: backward(ctx, saved, grad), grad, *saved)
        with torch.no_grad():
            return backward(ctx, saved, grad)

    return wrapper


def _keep(ctx, output, *saved) -> None:
    """Saves tensors for the backward of a Function whose first output alone has a gradient."""
    ctx.save_for_backward(*saved)
    ctx.mark_non_differentiable(*output[1:])
    if not torch.compiler.is_compiling():  # which neither knows it nor needs it
        ctx.set_materialize_grads(False)  # or each other output would get an array of zeros


class CompatibilityFunction(PerSample):
    """φ `[B, K]` of patches `[B, N, D]` and texts `[K, D]`, float32 (float64 for float64 inputs).

    `apply` returns a tuple, of which φ is the first: `torch.func` wants what the backward needs to be an output.
    """

    @staticmethod
    def forward(patches, texts, temperature, patch_mask, form, backend):
        return score(*operator_arguments(patches, texts, patch_mask, temperature, form, backend))

    @staticmethod
    def setup_context(ctx, inputs, output):
        patches, texts, temperature, patch_mask, form, backend = inputs
        tensors, ctx.options = operator_arguments(patches, texts, patch_mask, temperature, form, backend)
        _keep(ctx, output, *tensors, *output)

    @staticmethod
    @first_order
    def backward(ctx, saved, grad_phi):
        *inputs, phi, state = saved
        needs = ctx.needs_input_grad
        *grads, grad_temperature = score_gradients(
            inputs, ctx.options, phi, state, grad_phi.contiguous(), needs[0], needs[1], needs[2]
        )
        return *grads, like(grad_temperature, inputs[3]), None, None, None


class PaclFunction(PerSample):
    """The loss (0-D) of φ; gradients for patches, texts, logit scale, logit bias and temperature.

    `apply` returns a tuple, of which the loss is the first: `torch.func` wants what the backward needs to be an output.
    """

    @staticmethod
    def forward(patches, texts, logit_scale, logit_bias, temperature, patch_mask, form, loss, backend):
        phi, state = score(*operator_arguments(patches, texts, patch_mask, temperature, form, backend))
        if backends.fuses_loss(backend):
            scale, scale_value = tensor_or_number(logit_scale)
            scalars = scale, scale_value or 0.0, *tensor_or_number(logit_bias)
            value = phi.new_empty(())
            statistics = (phi.new_empty(4, phi.shape[0]),) if loss == "infonce" else ()
            ops.loss_forward(phi, *scalars, loss, backend, value, *(statistics or (None,)))
        else:
            value, statistics = _loss(logits_of(phi, logit_scale, logit_bias), loss)
        return value, phi, state, *statistics

    @staticmethod
    def setup_context(ctx, inputs, output):
        patches, texts, logit_scale, logit_bias, temperature, patch_mask, form, ctx.loss, backend = inputs
        tensors, ctx.options = operator_arguments(patches, texts, patch_mask, temperature, form, backend)
        scale, ctx.scale = tensor_or_number(logit_scale)
        bias, ctx.bias = tensor_or_number(logit_bias)
        _, phi, state, *statistics = output
        _keep(ctx, output, *tensors, phi, state, scale, bias, *statistics)

    @staticmethod
    @first_order
    def backward(ctx, saved, grad_loss):
        *inputs, phi, state, scale, bias = saved[:8]
        statistics = saved[8:]
        needs = ctx.needs_input_grad
        if backends.fuses_loss(ctx.options[-1]):
            grad_phi, grad_scale, grad_bias = torch.empty_like(phi), phi.new_empty(()), phi.new_empty(())
            scalars = scale, ctx.scale or 0.0, bias, ctx.bias
            ops.loss_backward(
                *(phi, *scalars, ctx.loss, ctx.options[-1], *(statistics or (None,))),
                *(grad_loss, grad_phi, grad_scale, grad_bias),
            )
        else:
            number_or_tensor = ctx.scale if scale is None else scale, ctx.bias if bias is None else bias
            grad_logits = _loss_gradient(logits_of(phi, *number_or_tensor), ctx.loss, statistics).mul_(grad_loss)
            grad_scale = (grad_logits * phi).sum() if needs[2] else None
            grad_bias = grad_logits.sum() if needs[3] else None
            grad_phi = grad_logits.mul_(as_like(number_or_tensor[0], phi))
        if grad_bias is not None and ctx.loss == "infonce":
            grad_bias.mul_(0.0)  # the loss does not depend on it: the sum is rounding, or NaN
        grad_scale = like(grad_scale, scale) if needs[2] else None
        grad_bias = like(grad_bias, bias) if needs[3] else None
        grad_patches, grad_texts, grad_temperature = score_gradients(
            inputs, ctx.options, phi, state, grad_phi, needs[0], needs[1], needs[4]
        )
        grad_temperature = like(grad_temperature, inputs[3])
        return grad_patches, grad_texts, grad_scale, grad_bias, grad_temperature, None, None, None, None


def like(grad: Tensor | None, scalar: Tensor) -> Tensor | None:
    """A 0-D gradient in the dtype and shape of its scalar."""
    return None if grad is None else grad.to(scalar.dtype).reshape(scalar.shape)


def tensor_or_number(value: Scalar | None) -> tuple[Tensor | None, float | None]:
    return (value, None) if isinstance(value, Tensor) else (None, value)


def operator_arguments(patches, texts, patch_mask, temperature, form, backend) -> tuple[tuple, tuple]:
    """What the operators take first: tensors (to be saved), then numbers and names."""
    tensor, number = tensor_or_number(temperature)
    return (patches, texts, patch_mask, tensor), (1.0 if number is None else number, form, backend)


def score(inputs, options) -> tuple[Tensor, Tensor]:
    patches, texts = inputs[:2]
    dtype = torch.float64 if patches.dtype == torch.float64 else torch.float32
    phi = patches.new_empty(patches.shape[0], texts.shape[0], dtype=dtype)
    state = torch.empty_like(phi)
    ops.compatibility_forward(*inputs, *options, phi, state)
    return phi, state


def score_gradients(
    inputs, options, phi, state, grad_phi, patches_need, texts_need, temperature_needs, texts_dtype=None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Those asked for, of patches, texts (in their dtype, or `texts_dtype`) and temperature."""
    patches, texts = inputs[:2]
    grad_patches = patches.new_empty(patches.shape) if patches_need else None
    grad_texts = texts.new_empty(texts.shape, dtype=texts_dtype) if texts_need else None
    grad_temperature = phi.new_empty(()) if temperature_needs else None
    if patches_need or texts_need or temperature_needs:
        ops.compatibility_backward(*inputs, *options, phi, state, grad_phi, grad_patches, grad_texts, grad_temperature)
    return grad_patches, grad_texts, grad_temperature


def as_like(value: Scalar, like: Tensor) -> Scalar:
    """A scalar in the dtype of `like`; a tensor 0-D, whose own dimensions would be added to those of `[B, K]`."""
    return value.to(like.dtype).reshape(()) if isinstance(value, Tensor) else value


def logits_of(phi: Tensor, scale: Scalar, bias: Scalar | None) -> Tensor:
    logits = phi * as_like(scale, phi)
    return logits if bias is None else logits.add_(as_like(bias, phi))


def _loss(logits: Tensor, loss: str) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss of `[B, B]`, and what its gradient needs beside the logits, which are lost."""
    if loss == "sigmoid":
        return contrastive.sigmoid(logits, 0) / logits.shape[0], ()
    rows, columns = (contrastive.sums(logits, dim).finish() for dim in (1, 0))
    return contrastive.infonce(logits.diagonal(), rows, columns), (*rows, *columns)


def _loss_gradient(logits: Tensor, loss: str, statistics: tuple[Tensor, ...]) -> Tensor:
    if loss == "sigmoid":
        return contrastive.sigmoid_gradient(logits, 0).div_(logits.shape[0])
    rows, columns = contrastive.LogSumExp(*statistics[:2]), contrastive.LogSumExp(*statistics[2:])
    return contrastive.infonce_gradient(logits, rows, columns, 0).div_(2 * logits.shape[0])
