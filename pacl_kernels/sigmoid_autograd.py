"""The sigmoid loss in one pass over the pairs, as an autograd Function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import ops
from .autograd import Gradients, Options, PerSample, first_order, keep, like, of_inputs, only_first_has_gradient
from .backends import computes_sigmoid_step
from .checks import Inputs


def in_one_pass(options: Options, inputs: Inputs) -> bool:
    """Return True if the backend computes the sigmoid loss of these inputs and its gradients in one pass."""
    if options.text_pool is not None or options.null_patch or options.normalize != "both" or options.grad_tolerance:
        return False
    n = inputs.patches.shape[-2] if inputs.patch_lengths is None else None
    return computes_sigmoid_step(options.backend, options.form, inputs.patches.dtype, n)


class SigmoidFunction(PerSample):
    """Sigmoid loss (0-D) whose gradients are computed in the forward, where ∂L/∂φ of a pair follows from its own φ.

    `apply(*inputs, logit_scale, logit_bias, image_ids, text_ids, targets, pair_bias, options, needs)`, with the fields
    of `Inputs`, returns a tuple that starts with the loss. `needs`: six values, True where patches, texts, logit scale,
    temperature, logit bias and pair bias need a gradient. Gradients go into `options.kept` if that is a list, otherwise
    they are the other outputs.
    """

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        options = arguments[-2]
        value, *grads = _sigmoid_step(*arguments)
        if options.kept is None:
            return value, *(x for x in grads if x is not None)
        options.kept.append(grads)
        return (value,)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *values, ctx.options, ctx.needs = inputs
        grads = list(output[1:])
        keep(ctx, *values, *(grads.pop(0) if needed and grads else None for needed in ctx.needs))
        only_first_has_gradient(ctx, output)

    @staticmethod
    @first_order
    def backward(ctx: Any, values: list[Any], grad_loss: Tensor) -> Gradients:
        grads, arguments = values[-6:], (*values[:-6], ctx.options, ctx.needs)
        inputs, (logit_scale, logit_bias) = Inputs(*values[:7]), values[7:9]
        kept = ctx.options.kept
        if kept is None:
            grads = [None if x is None else (x * grad_loss).to(x.dtype) for x in grads]
        else:
            grads = kept.pop() if kept else list(_sigmoid_step(*arguments)[1:])
            if grad_loss.is_cuda or grad_loss.item() != 1.0:  # on a GPU, reading it would wait
                # A factor with a dimension is not rounded to 16 bits before the product.
                factors = grad_loss, grad_loss.reshape(1)
                grads = [None if x is None else x.mul_(factors[x.is_cuda and x.dim() > 0]) for x in grads]
        patches, texts, scale, temperature, bias, pair_bias = grads
        of_loss = like(scale, logit_scale), like(bias, logit_bias), None, None, None, pair_bias
        return *of_inputs(inputs, patches, texts, temperature), *of_loss, None, None


def _sigmoid_step(*arguments: Any) -> tuple[Any, ...]:
    """Return the sigmoid loss and its gradients, in the order of `needs` and None where none is needed.

    The arguments are those of `SigmoidFunction`.
    """
    inputs, (logit_scale, logit_bias, *pairs, options, needs) = Inputs(*arguments[:7]), arguments[7:]
    patches, texts = inputs.patches, inputs.texts
    value = patches.new_empty((), dtype=torch.float32)
    shapes = (patches, texts, value, value, value, pairs[3])  # a scalar's gradient is 0-D
    grad_patches, grad_texts, grad_scale, grad_temperature, grad_bias, grad_pair_bias = grads = [
        x.new_empty(x.shape) if x is not None and needed else None for x, needed in zip(shapes, needs, strict=True)
    ]
    ops.sigmoid_step(
        patches, texts, inputs.patch_mask, *ops.pair(inputs.attn_temperature), *ops.pair(logit_scale),
        *ops.pair(logit_bias), *pairs, options.form, options.backend,
        value, grad_patches, grad_texts, grad_temperature, grad_scale, grad_bias, grad_pair_bias,
        inputs.patch_lengths,
    )  # fmt: skip
    return value, *grads
