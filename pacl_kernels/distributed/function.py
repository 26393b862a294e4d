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
from ..autograd import Gradients, Inputs, Options, compatibility, compatibility_gradients, first_order, keep, like
from ..checks import DTYPES, EXCHANGES, FORMS, LOSSES, Scalar
from ..contrastive import scalar
from . import collectives
from .agreement import Setting, make_plan
from .collectives import Plan, padded

Blocks = list[tuple[slice, Tensor]]  # columns and their texts, one block in memory at a time
RING_BYTES = 2 * 2**30  # size of the four float32 arrays `[B_local, texts]` of a block


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
) -> Tensor:
    """Return the loss (0-D) of the batch of all processes of the group; the arguments must have been checked."""
    if options.backend == "reference":
        raise ValueError("backend is 'reference', expected another one with a group: the reference runs in one process")
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "group is one of several processes, expected None or 'local' inside a transform of torch.func"
        )
    settings = {
        "form": Setting(options.form, FORMS),
        "loss": Setting(options.loss, LOSSES),
        "exchange": Setting(exchange, EXCHANGES),
        "patches' D": Setting(patches.shape[2], int),
        "patches' dtype": Setting(patches.dtype, DTYPES),
        "attn_temperature": Setting(attn_temperature, float),
        "logit_scale": Setting(logit_scale, float),
        "logit_bias": Setting(logit_bias, float),
    }
    for name, value in (
        ("texts", texts),
        ("attn_temperature", attn_temperature),
        ("logit_scale", logit_scale),
        ("logit_bias", logit_bias),
    ):
        # The collectives of the backward depend on `requires_grad`, so all processes must agree on it.
        needed = torch.is_grad_enabled() and isinstance(value, Tensor) and value.requires_grad
        settings[f"{name}.requires_grad"] = Setting(needed, bool)
    plan, headers = make_plan(group, texts, settings)
    return GlobalPaclFunction.apply(  # type: ignore[no-any-return]  # `apply` is untyped
        patches, texts, logit_scale, patch_mask, attn_temperature, logit_bias, options, plan, headers
    )


class GlobalPaclFunction(torch.autograd.Function):
    """Loss (0-D) of the global batch, the same in every process.

    Gradients of patches and texts are `world` times those of the whole batch, because DDP and FSDP average the
    gradients of parameters over processes. Gradients of the scalars are exact in every process.
    """

    @staticmethod
    def forward(
        ctx: Any, patches: Tensor, texts: Tensor, logit_scale: Scalar, patch_mask: Tensor | None,
        attn_temperature: Scalar, logit_bias: Scalar | None, options: Options, plan: Plan, headers: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.options, ctx.plan = options, plan
        inputs = Inputs(patches, texts, patch_mask, attn_temperature)
        sums = _GlobalSums(plan, options.loss, logit_scale, logit_bias, headers)
        if plan.ring:
            arrays: tuple[Tensor | None, ...] = (None,) * 3

            def visit(blocks: Blocks) -> None:
                for at, block in blocks:
                    sums.add(at, compatibility(inputs._replace(texts=block), options)[0])

            _send_round(padded(texts, plan), plan, patches.shape[0], visit)
        else:
            gathered, phi, _ = arrays = _gather_and_score(inputs, options, plan)
            sums.add(slice(0, gathered.shape[0]), phi)
        value, statistics = sums.finish()
        keep(ctx, *inputs, logit_scale, logit_bias, sums.sizes, *arrays, *statistics)
        return value

    @staticmethod
    @first_order
    def backward(ctx: Any, values: list[Any], grad_loss: Tensor) -> Gradients:
        plan, options, needs = ctx.plan, ctx.options, ctx.needs_input_grad
        needs_patches, needs_texts, needs_scale, _, needs_temperature, needs_bias = needs[:6]
        inputs = Inputs(*values[:4])
        logit_scale, logit_bias, sizes, gathered, phi, state, *statistics = values[4:]
        scale = scalar(logit_scale, torch.promote_types(inputs.patches.dtype, torch.float32))
        texts = inputs.texts
        valid, factor = _valid(sizes, plan), grad_loss * plan.world / sizes.sum()
        sums = torch.zeros(3, dtype=torch.float64, device=texts.device)  # gradients of scale, temperature and bias

        def gradients(at: slice, block: Tensor, phi: Tensor, state: Tensor) -> tuple[Any, Any]:
            """Return the gradients of patches and a block of texts in float32, and add up those of the scalars."""
            logits = _logits(phi, valid[at], logit_scale, logit_bias)
            grad = _gradient(logits, options.loss, statistics, _pairs(at, plan), at).mul_(factor)
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
        return grad_patches, grad_texts, grad_scale, None, grad_temperature, grad_bias, None, None, None


def _gather_and_score(inputs: Inputs, options: Options, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
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


def _send_round(texts: Tensor, plan: Plan, images: int, visit: Callable[[Blocks], None]) -> None:
    """Call `visit` with the texts of each process, its own first; the next texts travel meanwhile."""
    size = max(1, RING_BYTES // (16 * images))
    size -= size % 128 if size > 128 else 0
    for step in range(plan.world):
        coming = collectives.hop(texts, plan) if step + 1 < plan.world else None
        first = plan.columns((plan.rank - step) % plan.world).start
        blocks = zip(range(first, first + texts.shape[0], size), texts.split(size), strict=True)
        visit([(slice(at, at + x.shape[0]), x) for at, x in blocks])
        texts = texts if coming is None else collectives.wait(coming)


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

    _send_round(padded(texts, plan), plan, patches.shape[0], visit)
    return patches_sum.to(patches.dtype) if needs[0] else None, collectives.wait(travelling) if needs[1] else None


class _GlobalSums:
    """Accumulator of the loss of the global batch, from φ one block of columns at a time."""

    def __init__(self, plan: Plan, loss: str | None, logit_scale: Scalar, logit_bias: Scalar | None, headers: Tensor):
        self.plan, self.loss, self.scalars, self.headers = plan, loss, (logit_scale, logit_bias), headers
        self.valid: Any = None  # bool [B_global] after the first block
        self.rows: Any = None  # Sums after the first block
        self.pairs: list[Tensor] = []
        self.columns: list[tuple[slice, contrastive.Sums]] = []
        self.total: Any = 0.0  # a tensor after the first block

    def add(self, at: slice, phi: Tensor) -> None:
        if self.valid is None:  # wait only after the first block has been scored
            self.sizes = collectives.wait(self.headers)[:, 0].clone()
            self.valid, self.dtype = _valid(self.sizes, self.plan), phi.dtype
        logits, pairs = _logits(phi, self.valid[at], *self.scalars), _pairs(at, self.plan)
        if self.loss == "sigmoid":
            self.total = self.total + contrastive.sigmoid(logits, pairs).double()
            return
        if pairs is not None:
            self.pairs.append(logits.diagonal(pairs).double())
        rows = contrastive.sums(logits, 1)
        self.rows = rows if self.rows is None else contrastive.merge(self.rows, rows)
        self.columns.append((at, contrastive.sums(logits, 0)))

    def finish(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the loss, and for InfoNCE the log-sums of the own rows and of all columns; takes one all-reduce."""
        count = self.sizes.sum()
        if self.loss == "sigmoid":
            return (collectives.wait(collectives.all_reduce(self.total, self.plan)) / count).to(self.dtype), ()
        rows, pair = self.rows.finish(), torch.cat(self.pairs)
        # No common maximum, which would take another exchange: |φ| <= 1, and float64 holds exp(±600).
        shares = pair.new_empty(self.valid.shape[0] + 2)
        for at, columns in self.columns:
            shares[at] = columns.total.double() * columns.largest.double().exp()
        shares[-2] = contrastive.cross_entropy(pair, rows).sum()
        shares[-1] = pair.sum()
        shares = collectives.wait(collectives.all_reduce(shares, self.plan))
        logs = shares[:-2].log().masked_fill(~self.valid, 0.0)
        value = (shares[-2] + (logs.sum() - shares[-1])) / (2 * count)
        largest = logs.to(self.dtype)
        return value.to(self.dtype), (*rows, largest, (logs - largest).to(self.dtype))


def _gradient(logits: Tensor, loss: str | None, statistics: Sequence[Tensor], pairs: int | None, at: slice) -> Tensor:
    """Overwrite `logits`, a block of columns, with B ∂L/∂logits."""
    if loss == "sigmoid":
        return contrastive.sigmoid_gradient(logits, pairs)
    rows, columns = statistics[:2], (x[at] for x in statistics[2:])
    grad = contrastive.infonce_gradient(logits, contrastive.LogSumExp(*rows), contrastive.LogSumExp(*columns), pairs)
    return grad.div_(2)


def _logits(phi: Tensor, valid: Tensor, scale: Scalar, bias: Scalar | None) -> Tensor:
    logits = contrastive.logits_of(phi, scalar(scale, phi.dtype), scalar(bias, phi.dtype))
    return logits.masked_fill_(~valid, float("-inf"))


def _pairs(at: slice, plan: Plan) -> int | None:
    """Return the diagonal of the block that holds the pairs, or None if the block belongs to other processes."""
    own = plan.columns(plan.rank)
    return own.start - at.start if at.start < own.stop and own.start < at.stop else None


def _valid(sizes: Tensor, plan: Plan) -> Tensor:
    """Return bool `[B_global]`, False for padding."""
    return (torch.arange(plan.capacity, device=sizes.device) < sizes[:, None]).flatten()
