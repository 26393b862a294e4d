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

from .. import contrastive, lists
from ..autograd import (
    Gradients,
    Options,
    compatibility,
    compatibility_gradients,
    first_order,
    keep,
    keeping,
    like,
    needed,
)
from ..checks import EXCHANGES, LOSSES, Inputs, Scalar
from ..contrastive import scalar
from ..pairs import Pairs
from . import collectives, diagonal, labelled
from .agreement import Setting, make_plan, settings_of_phi
from .collectives import Plan, padded
from .listed import GlobalListedFunction, check_range
from .ring import Blocks, send_round
from .sigmoid import GlobalSigmoidFunction
from .texts import blocks_of, of_block, with_all_layouts


def global_loss(
    inputs: Inputs,
    logit_scale: Scalar,
    logit_bias: Scalar | None,
    options: Options,
    group: dist.ProcessGroup,
    exchange: str,
    pairs: Pairs | None = None,
    text_index: Tensor | None = None,
) -> Tensor:
    """Return the loss (0-D) of the batch of all processes of the group; the arguments must have been checked.

    With `text_index` `[B_local, M]`, texts are always gathered.
    """
    check_supported(options)
    settings = settings_of_phi(inputs, options) | {
        "loss": Setting(options.loss, LOSSES),
        "exchange": Setting(exchange, EXCHANGES),
        "logit_scale": Setting(logit_scale, float),
        "logit_bias": Setting(logit_bias, float),
        "pairs": Setting(_kind(pairs), _KINDS),
        "text_index": Setting("none" if text_index is None else "given", ("none", "given")),
    }
    for name, value in (
        ("patches", inputs.patches),
        ("texts", inputs.texts),
        ("attn_temperature", inputs.attn_temperature),
        ("logit_scale", logit_scale),
        ("logit_bias", logit_bias),
    ):
        settings[f"{name}.requires_grad"] = requires_grad(value)
    plan, headers = make_plan(group, inputs, settings)
    # The default loss adds exponentials without their maximum, which needs a bound of φ.
    labelled_pairs = pairs is not None or not _is_bounded(options)
    given = (None,) * 4 if pairs is None else pairs
    if text_index is not None:
        check_range(text_index, plan)
        index = lists.without_repeats(text_index)
        return GlobalListedFunction.apply(  # type: ignore[no-any-return]  # `apply` is untyped
            *(*inputs, logit_scale, logit_bias, *given, index, options, plan, headers)
        )
    labelled.check_columns(given, plan)
    needs = needed(inputs.patches, inputs.texts, logit_scale, inputs.attn_temperature, logit_bias)
    # Not for float16, where a GradScaler's factor must be in the gradients before they are rounded.
    if (
        options.loss == "sigmoid"
        and any(needs)
        and inputs.patches.dtype != torch.float16
        and not torch.compiler.is_compiling()
    ):
        return GlobalSigmoidFunction.apply(  # type: ignore[no-any-return]  # `apply` is untyped
            *(*inputs, logit_scale, logit_bias, *given, options, plan, headers, (*needs, *needed(given[3])))
        )
    options = keeping_in_group(options, inputs, plan)
    return GlobalPaclFunction.apply(  # type: ignore[no-any-return]  # `apply` is untyped
        *(*inputs, logit_scale, logit_bias, *given, options, plan, headers, labelled_pairs)
    )


def _is_bounded(options: Options) -> bool:
    """Return True if |φ| <= 1 for all inputs."""
    return options.text_pool not in ("sum", "logsumexp") and (options.normalize != "none" or options.form == "cosine")


def check_supported(options: Options) -> None:
    """Raise ValueError or RuntimeError where a group of several processes is not supported."""
    if options.backend == "reference":
        raise ValueError("backend is 'reference', expected another one with a group: the reference runs in one process")
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "group is one of several processes, expected None or 'local' inside a transform of torch.func"
        )


def keeping_in_group(options: Options, inputs: Inputs, plan: Plan) -> Options:
    """Return `keeping` of a gather whose parts begin at panels of texts and run the kernels of the backward.

    The number of texts chooses the kernels of the cosine form in bfloat16.
    """
    varies = options.form == "cosine" and inputs.patches.dtype == torch.bfloat16
    if torch.compiler.is_compiling() or plan.ring or plan.capacity % 32 or varies:
        return options
    return keeping(options, inputs)


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
        ctx: Any, patches: Tensor, texts: Tensor, patch_mask: Tensor | None, attn_temperature: Scalar,
        patch_lengths: Tensor | None, text_mask: Tensor | None, text_lengths: Tensor | None,
        logit_scale: Scalar, logit_bias: Scalar | None, image_ids: Tensor | None, text_ids: Tensor | None,
        targets: Tensor | None, pair_bias: Tensor | None, options: Options, plan: Plan, headers: Tensor,
        labelled_pairs: bool,
    ) -> Tensor:  # fmt: skip
        ctx.options, ctx.plan, ctx.labelled = options, plan, labelled_pairs
        inputs = Inputs(patches, texts, patch_mask, attn_temperature, patch_lengths, text_mask, text_lengths)
        inputs = with_all_layouts(inputs, plan)
        given = Pairs(image_ids, text_ids, targets, pair_bias)
        arguments = plan, options.loss, logit_scale, logit_bias, headers
        sums: diagonal.Sums | labelled.Sums
        if labelled_pairs:
            sums = labelled.Sums(*arguments, given, inputs.images)
        else:
            sums = diagonal.Sums(*arguments)
        if plan.ring:
            arrays: tuple[Tensor | None, ...] = (None,) * 3

            def visit(blocks: Blocks) -> None:
                for at, block in blocks:
                    sums.add(at, compatibility(of_block(inputs, at, block), options)[0])

            send_round(inputs, plan, visit)
        else:
            gathered, phi, _ = arrays = gather_and_score(inputs, options, plan)
            sums.add(slice(0, phi.shape[1]), phi)
        value, saved = sums.finish()
        keep(ctx, *inputs, logit_scale, logit_bias, pair_bias, *arrays, *saved)
        return value

    @staticmethod
    @first_order
    def backward(ctx: Any, values: list[Any], grad_loss: Tensor) -> Gradients:
        plan, options, needs = ctx.plan, ctx.options, ctx.needs_input_grad
        ctx.kept_pairs = None
        needs_patches, needs_texts, _, needs_temperature = needs[:4]
        needs_scale, needs_bias, *_, needs_pair_bias = needs[7:13]
        inputs = Inputs(*values[:7])
        logit_scale, logit_bias, pair_bias, gathered, phi, state, *saved = values[7:]
        scale = scalar(logit_scale, torch.promote_types(inputs.patches.dtype, torch.float32))
        kind = labelled if ctx.labelled else diagonal
        gradient = kind.Gradient(plan, options.loss, logit_scale, logit_bias, saved, grad_loss)
        padded_bias = None  # gradient of the pair bias, padding included
        if needs_pair_bias:
            padded_bias = pair_bias.new_empty(pair_bias.shape[0], plan.world * plan.capacity)
        sums = torch.zeros(
            3, dtype=torch.float64, device=inputs.texts.device
        )  # gradients of scale, temperature and bias

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
                of_block(inputs, at, block),
                *(options, phi, state, grad.mul_(scale), needs_patches, needs_texts, needs_temperature, phi.dtype, ctx),
            )
            if grad_temperature is not None:
                sums[1] += grad_temperature
            return grad_patches, grad_texts

        if plan.ring:
            grad_patches, grad_texts = _ring_gradients(gradients, inputs, options, needs, plan)
        else:
            grad_patches, grad_texts = gathered_gradients(gradients, inputs, (gathered, phi, state), needs, plan)
        if grad_texts is not None:
            grad_texts = grad_texts[: inputs.texts.shape[0]].to(inputs.texts.dtype, copy=True)
        if needs_scale or needs_temperature or needs_bias:
            sums = collectives.wait(collectives.all_reduce(sums / plan.world, plan))
        grad_scale = like(sums[0], logit_scale) if needs_scale else None
        grad_temperature = like(sums[1], inputs.attn_temperature) if needs_temperature else None
        grad_bias = like(sums[2], logit_bias) if needs_bias else None
        grad_pair_bias = (
            None if padded_bias is None else labelled.gather(padded_bias, pair_bias.shape[1], saved[0], plan)
        )
        return (
            *(grad_patches, grad_texts, None, grad_temperature, None, None, None),
            *(grad_scale, grad_bias, None, None, None, grad_pair_bias, None, None, None, None),
        )


def gather_and_score(inputs: Inputs, options: Options, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Return all texts `[world * rows, ...]`, φ and state `[B_local, B_global]`; the local texts are scored first.

    The state is empty for texts of many tokens, whose φ the backward computes again.
    """
    sent = padded(inputs.texts, plan)
    gathered = collectives.all_gather(sent, plan.world, plan.group)
    own = plan.columns(plan.rank)
    columns = plan.world * plan.capacity
    local, local_state = compatibility(of_block(inputs, own, sent), options, (columns, own.start))
    gathered = collectives.wait(gathered)
    phi = local.new_empty(local.shape[0], columns)
    state = torch.empty_like(phi) if options.text_pool is None else phi.new_empty(0)

    def put(at: slice, some: Tensor, some_state: Tensor) -> None:
        phi[:, at] = some
        if state.ndim == 2:
            state[:, at] = some_state

    put(own, local, local_state)
    if inputs.text_lengths is None:
        others = [slice(0, own.start), slice(own.stop, phi.shape[1])]
        blocks = [(at, gathered[at]) for at in others if at.start < at.stop]
    else:
        blocks = [block for block in blocks_of(inputs, gathered, plan) if block[0] != own]
    for at, texts in blocks:
        put(at, *compatibility(of_block(inputs, at, texts), options, (columns, at.start)))
    return gathered, phi, state


def gathered_gradients(
    gradients: Callable[..., tuple[Any, Any]],
    inputs: Inputs,
    arrays: tuple[Tensor, Tensor, Tensor],
    needs: Sequence[bool],
    plan: Plan,
) -> tuple[Tensor | None, Tensor | None]:
    """Return ∂L/∂P and the rows of ∂L/∂T that belong to this process, `[plan.rows, ...]`."""
    gathered, phi, state = arrays
    wide = torch.promote_types(inputs.patches.dtype, torch.float32)
    patches_sum: Any = None
    parts = []
    for at, block in blocks_of(inputs, gathered, plan):
        whole = at.stop - at.start == phi.shape[1]
        grad_patches, grad_texts = gradients(at, block, phi if whole else phi[:, at].contiguous(), state)
        parts.append(grad_texts)
        if needs[0]:
            patches_sum = grad_patches if patches_sum is None else patches_sum.to(wide).add_(grad_patches)
    grad_texts = None
    if needs[1]:
        grad_texts = collectives.reduce_scatter(torch.cat(parts) if len(parts) > 1 else parts[0], plan)
    return patches_sum.to(inputs.patches.dtype) if needs[0] else None, grad_texts


def _ring_gradients(
    gradients: Callable[..., tuple[Any, Any]],
    inputs: Inputs,
    options: Options,
    needs: Sequence[bool],
    plan: Plan,
) -> tuple[Tensor | None, Tensor | None]:
    """Return ∂L/∂P and ∂L/∂T `[plan.rows, ...]`; the latter travels with its texts, and every process adds to it."""
    patches = inputs.patches
    patches_sum: Any = None  # tensors after the first visit
    travelling: Any = None
    wide = torch.promote_types(patches.dtype, torch.float32)

    def visit(blocks: Blocks) -> None:
        nonlocal patches_sum, travelling
        parts = []
        for at, block in blocks:
            grad_patches, grad_texts = gradients(at, block, *compatibility(of_block(inputs, at, block), options))
            parts.append(grad_texts)
            if needs[0]:
                patches_sum = grad_patches.to(wide) if patches_sum is None else patches_sum.add_(grad_patches)
        if needs[1]:
            grad_texts = torch.cat(parts) if len(parts) > 1 else parts[0]
            if travelling is not None:
                grad_texts = grad_texts.add_(collectives.wait(travelling))
            travelling = collectives.hop(grad_texts, plan)

    send_round(inputs, plan, visit)
    return patches_sum.to(patches.dtype) if needs[0] else None, collectives.wait(travelling) if needs[1] else None
