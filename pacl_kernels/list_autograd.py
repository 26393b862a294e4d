"""φ of listed pairs `[B, M]` as an autograd Function, and their loss; see `lists.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import lists, ops
from .autograd import (
    Gradients,
    Options,
    PairLossFunction,
    PerSample,
    first_order,
    first_output,
    keep,
    of_inputs,
    only_first_has_gradient,
)
from .backends import takes_lists
from .checks import Inputs, Scalar
from .pairs import Pairs


def listed_compatibility(inputs: Inputs, text_index: Tensor, options: Options) -> Tensor:
    """Return φ `[B, M]` of the listed texts, 0 where the list has none; the arguments must have been checked."""
    if not takes_lists(options.backend, options.normalize):
        options = options._replace(backend="torch")
    return first_output(ListedCompatibilityFunction, *inputs, text_index, options._replace(kept=None))


def listed_loss(
    inputs: Inputs, logit_scale: Scalar, logit_bias: Scalar | None, given: Pairs, text_index: Tensor, options: Options
) -> Tensor:
    """Return the loss (0-D) of the listed pairs; the arguments must have been checked."""
    text_index = lists.without_repeats(text_index)
    phi = listed_compatibility(inputs, text_index, options)
    arguments = logit_scale, logit_bias, *given, text_index, inputs.text_count, options.loss
    return first_output(PairLossFunction, phi, *arguments)


def score(inputs: Inputs, text_index: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Return φ `[B, M]` of the listed texts, and the state that the backward reads; it is empty for many tokens."""
    patches, texts, patch_mask, attn_temperature, *layout = inputs
    dtype = torch.float64 if patches.dtype == torch.float64 else torch.float32
    phi = patches.new_empty(text_index.shape, dtype=dtype)
    state = torch.empty_like(phi) if options.text_pool is None else phi.new_empty(0)
    ops.compatibility_forward(
        patches, texts, patch_mask, *ops.pair(attn_temperature), options.form, options.backend, phi, state, None,
        *layout, *options.of_phi, text_index,
    )  # fmt: skip
    return phi, state


def gradients(
    inputs: Inputs, text_index: Tensor, options: Options, phi: Tensor, state: Tensor, grad_phi: Tensor,
    needs: Sequence[bool], texts_dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Return the gradients of patches, texts (in `texts_dtype`, by default their own) and temperature.

    `needs`: True where the input of that place needs one, in the order of `Inputs`.
    """
    patches, texts, patch_mask, attn_temperature, *layout = inputs
    needs_patches, needs_texts, _, needs_temperature, *_ = needs
    grads = (
        patches.new_empty(patches.shape) if needs_patches else None,
        texts.new_empty(texts.shape, dtype=texts_dtype) if needs_texts else None,
        phi.new_empty(()) if needs_temperature else None,
    )
    if needs_patches or needs_texts or needs_temperature:
        ops.compatibility_backward(
            patches, texts, patch_mask, *ops.pair(attn_temperature), options.form, options.backend, phi, state,
            grad_phi, *grads, None, False, *layout, *options.of_phi, text_index,
        )  # fmt: skip
    return grads


class ListedCompatibilityFunction(PerSample):
    """φ `[B, M]` of patches `[B, N, D]` and texts `[K, D]` in the lists `[B, M]`, int64 with -1 for none.

    `apply(*inputs, text_index, options)`, with the fields of `Inputs`, returns a tuple that starts with φ, float32
    (float64 for float64 inputs); the other output is for the backward.
    """

    @staticmethod
    def forward(
        patches: Tensor, texts: Tensor, patch_mask: Tensor | None, attn_temperature: Scalar,
        patch_lengths: Tensor | None, text_mask: Tensor | None, text_lengths: Tensor | None, text_index: Tensor,
        options: Options,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        layout = patch_lengths, text_mask, text_lengths
        return score(Inputs(patches, texts, patch_mask, attn_temperature, *layout), text_index, options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *values, ctx.options = inputs
        keep(ctx, *values, *output)
        only_first_has_gradient(ctx, output)

    @staticmethod
    @first_order
    def backward(ctx: Any, values: list[Any], grad_phi: Tensor) -> Gradients:
        *fields, text_index, phi, state = values
        inputs = Inputs(*fields)
        grads = gradients(inputs, text_index, ctx.options, phi, state, grad_phi.contiguous(), ctx.needs_input_grad)
        return *of_inputs(inputs, *grads), None, None
