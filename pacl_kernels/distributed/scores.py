"""Compatibility of this process's images with the texts of all processes, for losses of one's own."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..autograd import Gradients, Options, compatibility_gradients, first_order, keep, like
from ..checks import DTYPES, FORMS, Inputs, Scalar
from . import collectives
from .agreement import Setting, make_plan
from .collectives import Plan
from .function import check_supported, gather_and_score, requires_grad


def global_compatibility(
    patches: Tensor,
    texts: Tensor,
    patch_mask: Tensor | None,
    attn_temperature: Scalar,
    options: Options,
    group: dist.ProcessGroup,
) -> Tensor:
    """Return φ `[B_local, K of all processes]`; the arguments must have been checked."""
    check_supported(options)
    settings = {
        "form": Setting(options.form, FORMS),
        "patches' D": Setting(patches.shape[2], int),
        "patches' dtype": Setting(patches.dtype, DTYPES),
        "attn_temperature": Setting(attn_temperature, float),
        "texts.requires_grad": requires_grad(texts),
    }
    plan, headers = make_plan(group, texts, settings | {"exchange": Setting("gather", ("gather",))}, fixed_sizes=True)
    if not torch.compiler.is_compiling():
        collectives.wait(headers)
    phi: Tensor = GlobalCompatibilityFunction.apply(patches, texts, patch_mask, attn_temperature, options, plan)
    return phi


class GlobalCompatibilityFunction(torch.autograd.Function):
    """φ `[B_local, K of all processes]`, the texts in the order of the ranks.

    The gradient of a text is the sum over all processes, as in `torch.distributed.nn.functional.all_gather`; that of
    the temperature is this process's own.
    """

    @staticmethod
    def forward(
        ctx: Any, patches: Tensor, texts: Tensor, patch_mask: Tensor | None, attn_temperature: Scalar,
        options: Options, plan: Plan,
    ) -> Tensor:  # fmt: skip
        ctx.options, ctx.plan = options, plan
        inputs = Inputs(patches, texts, patch_mask, attn_temperature)
        arrays = gather_and_score(inputs, options, plan)
        keep(ctx, *inputs, *arrays)
        phi = arrays[1]
        return phi.clone() if _is_even(plan) else torch.cat([phi[:, at] for at in _real(plan)], 1)

    @staticmethod
    @first_order
    def backward(ctx: Any, values: list[Any], grad_phi: Tensor) -> Gradients:
        inputs, (gathered, phi, state) = Inputs(*values[:7]), values[7:]
        if not _is_even(ctx.plan):
            parts, grad_phi = grad_phi.split(ctx.plan.sizes, 1), torch.zeros_like(phi)
            for at, part in zip(_real(ctx.plan), parts, strict=True):
                grad_phi[:, at] = part
        needs_patches, needs_texts, _, needs_temperature, *_ = ctx.needs_input_grad
        grad_patches, grad_texts, grad_temperature = compatibility_gradients(
            inputs._replace(texts=gathered),
            *(ctx.options, phi, state, grad_phi.contiguous(), needs_patches, needs_texts, needs_temperature, phi.dtype),
        )
        if grad_texts is not None:
            grad_texts = collectives.reduce_scatter(grad_texts, ctx.plan)
            grad_texts = grad_texts[: inputs.texts.shape[0]].to(inputs.texts.dtype, copy=True)
        return grad_patches, grad_texts, None, like(grad_temperature, inputs.attn_temperature), None, None


def _is_even(plan: Plan) -> bool:
    assert plan.sizes is not None  # the plan was made with `fixed_sizes`
    return all(size == plan.capacity for size in plan.sizes)


def _real(plan: Plan) -> list[slice]:
    """Return the columns of each process's texts, without their padding."""
    return [plan.real(rank) for rank in range(plan.world)]
