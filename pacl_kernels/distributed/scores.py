"""Compatibility of this process's images with the texts of all processes, for losses of one's own."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..autograd import Gradients, Options, compatibility_gradients, first_order, keep, like
from ..checks import Inputs, Scalar
from . import collectives
from .agreement import Setting, make_plan, settings_of_phi
from .collectives import Plan
from .function import check_supported, gather_and_score, gathered_gradients, keeping_in_group, requires_grad
from .texts import of_block, with_all_layouts


def global_compatibility(inputs: Inputs, options: Options, group: dist.ProcessGroup) -> Tensor:
    """Return φ `[B_local, K of all processes]`; the arguments must have been checked."""
    check_supported(options)
    settings = settings_of_phi(inputs, options) | {
        "texts.requires_grad": requires_grad(inputs.texts),
        "exchange": Setting("gather", ("gather",)),
    }
    plan, headers = make_plan(group, inputs, settings, fixed_sizes=True)
    if not torch.compiler.is_compiling():
        collectives.wait(headers)
    phi: Tensor = GlobalCompatibilityFunction.apply(*inputs, keeping_in_group(options, inputs, plan), plan)
    return phi


class GlobalCompatibilityFunction(torch.autograd.Function):
    """φ `[B_local, K of all processes]`, the texts in the order of the ranks.

    The gradient of a text is the sum over all processes, as in `torch.distributed.nn.functional.all_gather`; that of
    the temperature is this process's own.
    """

    @staticmethod
    def forward(
        ctx: Any, patches: Tensor, texts: Tensor, patch_mask: Tensor | None, attn_temperature: Scalar,
        patch_lengths: Tensor | None, text_mask: Tensor | None, text_lengths: Tensor | None,
        options: Options, plan: Plan,
    ) -> Tensor:  # fmt: skip
        ctx.options, ctx.plan = options, plan
        inputs = Inputs(patches, texts, patch_mask, attn_temperature, patch_lengths, text_mask, text_lengths)
        inputs = with_all_layouts(inputs, plan)
        arrays = gather_and_score(inputs, options, plan)
        keep(ctx, *inputs, *arrays)
        phi = arrays[1]
        return phi.clone() if _is_even(plan) else torch.cat([phi[:, plan.real(rank)] for rank in range(plan.world)], 1)

    @staticmethod
    @first_order
    def backward(ctx: Any, values: list[Any], grad_phi: Tensor) -> Gradients:
        inputs, (gathered, phi, state), plan = Inputs(*values[:7]), values[7:], ctx.plan
        if not _is_even(plan):
            parts, grad_phi = grad_phi.split(plan.sizes, 1), torch.zeros_like(phi)
            for rank, part in enumerate(parts):
                grad_phi[:, plan.real(rank)] = part
        needs = ctx.needs_input_grad
        temperature: Any = 0.0

        def gradients(at: slice, block: Tensor, phi: Tensor, state: Tensor) -> tuple[Any, Any]:
            nonlocal temperature
            grad_patches, grad_texts, grad_temperature = compatibility_gradients(
                of_block(inputs, at, block),
                *(ctx.options, phi, state, grad_phi[:, at].contiguous(), needs[0], needs[1], needs[3], phi.dtype),
            )
            if grad_temperature is not None:
                temperature = temperature + grad_temperature
            return grad_patches, grad_texts

        grad_patches, grad_texts = gathered_gradients(gradients, inputs, (gathered, phi, state), needs, plan)
        if grad_texts is not None:
            grad_texts = grad_texts[: inputs.texts.shape[0]].to(inputs.texts.dtype, copy=True)
        grad_temperature = like(temperature, inputs.attn_temperature) if needs[3] else None
        return grad_patches, grad_texts, None, grad_temperature, *(None,) * 5


def _is_even(plan: Plan) -> bool:
    assert plan.sizes is not None  # the plan was made with `fixed_sizes`
    return all(size == plan.capacity for size in plan.sizes)
