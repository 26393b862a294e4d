"""Loss over the batch of every process of a `torch.distributed` group: texts travel, patches stay.

Each process computes its rows of φ, `[B_local, B_global]`. The log-sum-exps of these rows are local; those of the
columns need one all-reduce. The texts are exchanged in one of two ways:

- "gather": one all-gather of the texts, during which the local texts are scored, and in the backward one
  reduce-scatter of their gradient.
- "ring": texts, and in the backward their gradient, travel from neighbour to neighbour, and the backward recomputes
  each block of φ (5 units of work instead of 4). Only a few numbers per text grow with the global batch, and no block
  of φ exceeds `RING_BYTES`.

No step waits for the device: texts are padded to the largest local batch that the processes agreed on, the number of
real texts is a tensor, and padding is masked out of every sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import contrastive
from ..autograd import (
    Gradients,
    Options,
    compatibility,
    compatibility_gradients,
    first_order,
    keep,
    like,
    needed,
)
from ..checks import DTYPES, EXCHANGES, FORMS, LOSSES, Inputs, Scalar
from ..contrastive import scalar
from ..pairs import Pairs
from . import collectives, diagonal, labelled
from .agreement import Setting, make_plan
from .collectives import Plan, padded
from .ring import Blocks, send_round
from .sigmoid import GlobalSigmoidFunction


def global_loss(
    patches: Tensor,
    texts: Tensor,
    logit_scale: Scalar,
    patch_mask: Tensor | None,
    attn_temperature: Scalar,
    logit_bias: Scalar | None,
    options: Options,
    group: dist.ProcessGroup,
    exchange: str,
    pairs: Pairs | None = None,
) -> Tensor:
    """Return the loss (0-D) of the batch of all processes of the group; the arguments must have been checked."""
    check_supported(options)
    settings = {
        "form": Setting(options.form, FORMS),
        "loss": Setting(options.loss, LOSSES),
        "exchange": Setting(exchange, EXCHANGES),
        "patches' D": Setting(patches.shape[2], int),
        "patches' dtype": Setting(patches.dtype, DTYPES),
        "attn_temperature": Setting(attn_temperature, float),
        "logit_scale": Setting(logit_scale, float),
        "logit_bias": Setting(logit_bias, float),
        "pairs": Setting(_kind(pairs), _KINDS),
    }
    for name, value in (
        ("patches", patches),
        ("texts", texts),
        ("attn_temperature", attn_temperature),
        ("logit_scale", logit_scale),
        ("logit_bias", logit_bias),
    ):
        settings[f"{name}.requires_grad"] = requires_grad(value)
    plan, headers = make_plan(group, texts, settings)
    given = (None,) * 4 if pairs is None else pairs
    labelled.check_columns(given, plan)
    needs = needed(patches, texts, logit_scale, attn_temperature, logit_bias)
    # Not for float16, where a GradScaler's factor must be in the gradients before they are rounded.
    if (
        options.loss == "sigmoid"
        and any(needs)
        and patches.dtype != torch.float16
        and not torch.compiler.is_compiling()
    ):
        return GlobalSigmoidFunction.apply(  # type: ignore[no-any-return]  # `apply` is untyped
            *(patches, texts, logit_scale, patch_mask, attn_temperature, logit_bias, *given),
            *(options, plan, headers, (*needs, *needed(given[3]))),
        )
    return GlobalPaclFunction.apply(  # type: ignore[no-any-return]  # `apply` is untyped
        patches, texts, logit_scale, patch_mask, attn_temperature, logit_bias, *given, options, plan, headers
    )


def check_supported(options: Options) -> None:
    """Raise ValueError or RuntimeError where a group of several processes is not supported."""
    if options.backend == "reference":
        raise ValueError("backend is 'reference', expected another one with a group: the reference runs in one process")
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "group is one of several processes, expected None or 'local' inside a transform of torch.func"
        )


def requires_grad(value: Scalar | None) -> Setting:
    """Return the setting on which all processes must agree, because the collectives of the backward depend on it."""
    return Setting(torch.is_grad_enabled() and isinstance(value, Tensor) and value.requires_grad, bool)


_KINDS = ("default", "bias alone", "ids", "targets")


def _kind(pairs: Pairs | None) -> str:
    """Return what says which pairs are positive; each kind exchanges something else."""
    if pairs is None:
        return "default"
    if pairs.targets is not None:
        return "targets"
    return "bias alone" if pairs.image_ids is None else "ids"


class GlobalPaclFunction(torch.autograd.Function):
    """Loss (0-D) of the global batch, the same in every process.

    Gradients of patches and texts are `world` times those of the whole batch, because DDP and FSDP average the
    gradients of parameters over processes. Gradients of the scalars are exact in every process.
    """

    @staticmethod
    def forward(
        ctx: Any, patches: Tensor, texts: Tensor, logit_scale: Scalar, patch_mask: Tensor | None,
        attn_temperature: Scalar, logit_bias: Scalar | None, image_ids: Tensor | None, text_ids: Tensor | None,
        targets: Tensor | None, pair_bias: Tensor | None, options: Options, plan: Plan, headers: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.options, ctx.plan = options, plan
        inputs = Inputs(patches, texts, patch_mask, attn_temperature)
        given = Pairs(image_ids, text_ids, targets, pair_bias)
        ctx.labelled = any(x is not None for x in given)
        arguments = plan, options.loss, logit_scale, logit_bias, headers
        sums: diagonal.Sums | labelled.Sums
        if ctx.labelled:
            sums = labelled.Sums(*arguments, given, patches.shape[0])
        else:
            sums = diagonal.Sums(*arguments)
        if plan.ring:
            arrays: tuple[Tensor | None, ...] = (None,) * 3

            def visit(blocks: Blocks) -> None:
                for at, block in blocks:
                    sums.add(at, compatibility(inputs._replace(texts=block), options)[0])

            send_round(padded(texts, plan), plan, patches.shape[0], visit)
        else:
            gathered, phi, _ = arrays = gather_and_score(inputs, options, plan)
            sums.add(slice(0, gathered.shape[0]), phi)
        value, saved = sums.finish()
        keep(ctx, *inputs, logit_scale, logit_bias, pair_bias, *arrays, *saved)
        return value

    @staticmethod
    @first_order
    def backward(ctx: Any, values: list[Any], grad_loss: Tensor) -> Gradients:
        plan, options, needs = ctx.plan, ctx.options, ctx.needs_input_grad
        needs_patches, needs_texts, needs_scale, _, needs_temperature, needs_bias = needs[:6]
        inputs = Inputs(*values[:7])
        logit_scale, logit_bias, pair_bias, gathered, phi, state, *saved = values[7:]
        scale = scalar(logit_scale, torch.promote_types(inputs.patches.dtype, torch.float32))
        texts = inputs.texts
        kind = labelled if ctx.labelled else diagonal
        gradient = kind.Gradient(plan, options.loss, logit_scale, logit_bias, saved, grad_loss)
        padded_bias = None  # gradient of the pair bias, padding included
        if needs[9]:
            padded_bias = pair_bias.new_empty(pair_bias.shape[0], plan.world * plan.capacity)
        sums = torch.zeros(3, dtype=torch.float64, device=texts.device)  # gradients of scale, temperature and bias

        def gradients(at: slice, block: Tensor, phi: Tensor, state: Tensor) -> tuple[Any, Any]:
            """Return the gradients of patches and a block of texts in float32, and add up those of the scalars."""
            grad = gradient(at, phi)
            if padded_bias is not None:
                padded_bias[:, at] = grad
            if needs_scale:
                sums[0] += contrastive.total(grad * phi)
            if needs_bias and options.loss == "sigmoid":  # InfoNCE does not depend on it
                sums[2] += contrastive.total(grad)
            grad_patches, grad_texts, grad_temperature = compatibility_gradients(
                inputs._replace(texts=block),
                *(options, phi, state, grad.mul_(scale), needs_patches, needs_texts, needs_temperature, phi.dtype),
            )
            if grad_temperature is not None:
                sums[1] += grad_temperature
            return grad_patches, grad_texts

        if plan.ring:
            grad_patches, grad_texts = _ring_gradients(gradients, inputs, options, needs, plan)
        else:
            grad_patches, grad_texts = gradients(slice(0, gathered.shape[0]), gathered, phi, state)
            grad_texts = collectives.reduce_scatter(grad_texts, plan) if needs_texts else None
        if grad_texts is not None:
            grad_texts = grad_texts[: texts.shape[0]].to(texts.dtype, copy=True)
        if needs_scale or needs_temperature or needs_bias:
            sums = collectives.wait(collectives.all_reduce(sums / plan.world, plan))
        grad_scale = like(sums[0], logit_scale) if needs_scale else None
        grad_temperature = like(sums[1], inputs.attn_temperature) if needs_temperature else None
        grad_bias = like(sums[2], logit_bias) if needs_bias else None
        grad_pair_bias = (
            None if padded_bias is None else labelled.gather(padded_bias, pair_bias.shape[1], saved[0], plan)
        )
        return (
            *(grad_patches, grad_texts, grad_scale, None, grad_temperature, grad_bias),
            *(None, None, None, grad_pair_bias, None, None, None),
        )


def gather_and_score(inputs: Inputs, options: Options, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Return all texts `[B_global, D]`, φ and state `[B_local, B_global]`; the local texts are scored first."""
    sent = padded(inputs.texts, plan)
    gathered = collectives.all_gather(sent, plan.world, plan.group)
    local = compatibility(inputs._replace(texts=sent), options)
    gathered = collectives.wait(gathered)
    phi, state = (x.new_empty(x.shape[0], gathered.shape[0]) for x in local)
    own = plan.columns(plan.rank)
    phi[:, own], state[:, own] = local
    for at in (slice(0, own.start), slice(own.stop, gathered.shape[0])):
        if at.start < at.stop:
            phi[:, at], state[:, at] = compatibility(inputs._replace(texts=gathered[at]), options)
    return gathered, phi, state


def _ring_gradients(
    gradients: Callable[..., tuple[Any, Any]],
    inputs: Inputs,
    options: Options,
    needs: Sequence[bool],
    plan: Plan,
) -> tuple[Tensor | None, Tensor | None]:
    """Return ∂L/∂P and ∂L/∂T `[capacity, D]`; the latter travels with its texts, and every process adds to it."""
    patches, texts = inputs.patches, inputs.texts
    patches_sum: Any = None  # tensors after the first visit
    travelling: Any = None
    wide = torch.promote_types(patches.dtype, torch.float32)

    def visit(blocks: Blocks) -> None:
        nonlocal patches_sum, travelling
        parts = []
        for at, block in blocks:
            grad_patches, grad_texts = gradients(at, block, *compatibility(inputs._replace(texts=block), options))
            parts.append(grad_texts)
            if needs[0]:
                patches_sum = grad_patches.to(wide) if patches_sum is None else patches_sum.add_(grad_patches)
        if needs[1]:
            grad_texts = torch.cat(parts) if len(parts) > 1 else parts[0]
            if travelling is not None:
                grad_texts = grad_texts.add_(collectives.wait(travelling))
            travelling = collectives.hop(grad_texts, plan)

    send_round(padded(texts, plan), plan, patches.shape[0], visit)
    return patches_sum.to(patches.dtype) if needs[0] else None, collectives.wait(travelling) if needs[1] else None
