"""The autograd Functions: they allocate what the operators write, and say what the backward needs.

They check nothing (`loss.py` does) and keep no more than three `[B, K]` arrays alive between forward and backward:
φ, the backend's state, and in the backward ∂L/∂φ.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops
from .ops import Scalar


class Options(NamedTuple):
    """The choices of a call, as `fused_pacl_loss` describes them; `loss` is None for the compatibility alone."""

    form: str
    loss: str | None
    backend: str


class Inputs(NamedTuple):
    """What φ `[B, K]` depends on: patches `[B, N, D]`, texts `[K, D]`, their mask `[B, N]` and the temperature."""

    patches: Tensor
    texts: Tensor
    patch_mask: Tensor | None
    attn_temperature: Scalar


class PerSample(torch.autograd.Function):
    """A Function that `torch.func.vmap` calls once for each sample: the operators fill buffers and know no batches."""

    @classmethod
    def vmap(cls, info, in_dims, *arguments):
        calls = [
            cls.apply(*(x.select(d, i) if isinstance(d, int) else x for x, d in zip(arguments, in_dims, strict=True)))
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
    """Like `once_differentiable`, but also refuses a second derivative that depends on saved tensors alone (a penalty).

    `backward` takes ctx, the values that `keep` saved and the gradient of the first output; the others have none.
    """

    @functools.wraps(backward)
    def wrapper(ctx, grad, *_):
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)

        def compute(grad, *saved):
            return backward(ctx, [ctx.others.get(i, x) for i, x in enumerate(saved)], grad)

        saved = ctx.saved_tensors  # once: a checkpoint gives them out no second time, hooks would copy them again
        transformed = not torch.compiler.is_compiling() and (
            torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()
        )
        if transformed:
            return _Gradients.apply(compute, grad, *saved)
        with torch.no_grad():
            return compute(grad, *saved)

    return wrapper


def keep(ctx, *values) -> None:
    """Saves tensors, numbers and None for the backward, which `first_order` hands them to."""
    ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in values))
    ctx.others = {i: x for i, x in enumerate(values) if not isinstance(x, Tensor)}


def _only_first_has_gradient(ctx, output) -> None:
    ctx.mark_non_differentiable(*output[1:])
    if not torch.compiler.is_compiling():  # which neither knows it nor needs it
        ctx.set_materialize_grads(False)  # or each other output would get an array of zeros


class CompatibilityFunction(PerSample):
    """φ `[B, K]` of patches `[B, N, D]` and texts `[K, D]`, float32 (float64 for float64 inputs).

    `apply(patches, texts, patch_mask, attn_temperature, options)` returns a tuple, of which φ is the first, because
    `torch.func` wants what the backward needs to be an output.
    """

    @staticmethod
    def forward(patches, texts, patch_mask, attn_temperature, options):
        return compatibility(Inputs(patches, texts, patch_mask, attn_temperature), options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *values, ctx.options = inputs
        keep(ctx, *values, *output)
        _only_first_has_gradient(ctx, output)

    @staticmethod
    @first_order
    def backward(ctx, values, grad_phi):
        *values, phi, state = values
        needs = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
        grad_patches, grad_texts, grad_temperature = compatibility_gradients(
            Inputs(*values), ctx.options, phi, state, grad_phi.contiguous(), *needs
        )
        return grad_patches, grad_texts, None, like(grad_temperature, values[3]), None


class PaclFunction(PerSample):
    """The loss (0-D) of φ; gradients for patches, texts, logit scale, temperature and logit bias.

    `apply(patches, texts, logit_scale, patch_mask, attn_temperature, logit_bias, options)` returns a tuple, of which
    the loss is the first, because `torch.func` wants what the backward needs to be an output.
    """

    @staticmethod
    def forward(patches, texts, logit_scale, patch_mask, attn_temperature, logit_bias, options):
        phi, state = compatibility(Inputs(patches, texts, patch_mask, attn_temperature), options)
        value = phi.new_empty(())
        statistics = phi.new_empty(4, phi.shape[0]) if options.loss == "infonce" else None
        scalars = *ops.pair(logit_scale), *ops.pair(logit_bias)
        ops.loss_forward(phi, *scalars, options.loss, options.backend, value, statistics)
        return value, phi, state, *(() if statistics is None else (statistics,))

    @staticmethod
    def setup_context(ctx, inputs, output):
        *values, ctx.options = inputs
        _, phi, state, *statistics = output
        keep(ctx, *values, phi, state, *(statistics or (None,)))
        _only_first_has_gradient(ctx, output)

    @staticmethod
    @first_order
    def backward(ctx, values, grad_loss):
        patches, texts, logit_scale, patch_mask, attn_temperature, logit_bias, phi, state, statistics = values
        needs_patches, needs_texts, needs_scale, _, needs_temperature, needs_bias, _ = ctx.needs_input_grad
        grad_phi = torch.empty_like(phi)
        grad_scale, grad_bias = (phi.new_empty(()) if needs else None for needs in (needs_scale, needs_bias))
        scalars = *ops.pair(logit_scale), *ops.pair(logit_bias)
        ops.loss_backward(
            phi, *scalars, ctx.options.loss, ctx.options.backend, statistics, grad_loss, grad_phi, grad_scale, grad_bias
        )
        grad_patches, grad_texts, grad_temperature = compatibility_gradients(
            Inputs(patches, texts, patch_mask, attn_temperature),
            *(ctx.options, phi, state, grad_phi, needs_patches, needs_texts, needs_temperature),
        )
        grad_scale, grad_bias = like(grad_scale, logit_scale), like(grad_bias, logit_bias)
        grad_temperature = like(grad_temperature, attn_temperature)
        return grad_patches, grad_texts, grad_scale, None, grad_temperature, grad_bias, None


def like(grad: Tensor | None, scalar: Scalar | None) -> Tensor | None:
    """A 0-D gradient in the dtype and shape of its scalar."""
    return None if grad is None else grad.to(scalar.dtype).reshape(scalar.shape)


def compatibility(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    """φ `[B, K]` and the backend's state `[B, K]`, which its backward reads."""
    patches, texts, patch_mask, attn_temperature = inputs
    dtype = torch.float64 if patches.dtype == torch.float64 else torch.float32
    phi = patches.new_empty(patches.shape[0], texts.shape[0], dtype=dtype)
    state = torch.empty_like(phi)
    ops.compatibility_forward(
        patches, texts, patch_mask, *ops.pair(attn_temperature), options.form, options.backend, phi, state
    )
    return phi, state


def compatibility_gradients(
    inputs: Inputs,
    options: Options,
    phi: Tensor,
    state: Tensor,
    grad_phi: Tensor,
    needs_patches: bool,
    needs_texts: bool,
    needs_temperature: bool,
    texts_dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients from ∂L/∂φ, those that are needed, of patches, texts (in their dtype or `texts_dtype`), temperature."""
    patches, texts, patch_mask, attn_temperature = inputs
    grad_patches = patches.new_empty(patches.shape) if needs_patches else None
    grad_texts = texts.new_empty(texts.shape, dtype=texts_dtype) if needs_texts else None
    grad_temperature = phi.new_empty(()) if needs_temperature else None
    if needs_patches or needs_texts or needs_temperature:
        ops.compatibility_backward(
            patches, texts, patch_mask, *ops.pair(attn_temperature), options.form, options.backend,
            phi, state, grad_phi, grad_patches, grad_texts, grad_temperature,
        )  # fmt: skip
    return grad_patches, grad_texts, grad_temperature
