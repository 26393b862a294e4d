"""The sigmoid loss of the global batch, with its gradients computed in the forward.

The gradient of a pair's φ follows from that φ alone, so a block of texts is finished once it has been scored: texts
travel once, no sums over rows or columns are exchanged, and no block is computed again. In the ring the gradient of the
texts travels right behind them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..autograd import (
    Gradients,
    Options,
    compatibility,
    compatibility_gradients,
    first_order,
    keep,
    like,
)
from ..checks import Inputs, Scalar
from ..pairs import Pairs
from ..sigmoid_autograd import in_one_pass
from . import collectives, labelled
from .collectives import Plan, padded
from .diagonal import valid_columns
from .ring import Blocks, send_round
from .texts import blocks_of, of_block, with_all_layouts


class GlobalSigmoidFunction(torch.autograd.Function):
    """Sigmoid loss (0-D) of the global batch, the same in every process, whose gradients are made in the forward.

    They have the factors of `GlobalPaclFunction`; the backward multiplies them by the incoming gradient. `needs` is as
    in `SigmoidFunction`.
    """

    @staticmethod
    def forward(
        ctx: Any, patches: Tensor, texts: Tensor, patch_mask: Tensor | None, attn_temperature: Scalar,
        patch_lengths: Tensor | None, text_mask: Tensor | None, text_lengths: Tensor | None,
        logit_scale: Scalar, logit_bias: Scalar | None, image_ids: Tensor | None, text_ids: Tensor | None,
        targets: Tensor | None, pair_bias: Tensor | None, options: Options, plan: Plan, headers: Tensor,
        needs: tuple[bool, ...],
    ) -> Tensor:  # fmt: skip
        inputs = Inputs(patches, texts, patch_mask, attn_temperature, patch_lengths, text_mask, text_lengths)
        images, sizes = inputs.images, collectives.wait(headers)[:, 0]
        pairs = labelled.with_padding(Pairs(image_ids, text_ids, targets, pair_bias), images, sizes, plan)
        inputs = with_all_layouts(inputs, plan)
        batch = _Batch(inputs, logit_scale, logit_bias, pairs, options, plan, sizes, needs)
        grad_texts = batch.ring() if plan.ring else batch.gather()
        sums = collectives.wait(collectives.all_reduce(batch.sums, plan))
        value, *grads = (sums[:4] / sums[4]).unbind()
        scalars = logit_scale, attn_temperature, logit_bias
        grad_scalars = [
            like(x, to) if needed else None for x, to, needed in zip(grads, scalars, needs[2:5], strict=True)
        ]
        share = plan.world / sums[4]
        grad_patches, grad_pairs = batch.grad_patches, None
        if grad_patches is not None:
            grad_patches = (grad_patches * (share * images)).to(patches.dtype)
        if grad_texts is not None:
            grad_texts = (grad_texts[: texts.shape[0]] * share).to(texts.dtype)
        if batch.grad_pairs is not None and pair_bias is not None:
            grad_pairs = labelled.gather(batch.grad_pairs.mul_(share * images), pair_bias.shape[1], sizes, plan)
        # The inputs are kept for `first_order` alone, which makes a second derivative an error.
        keep(ctx, grad_patches, grad_texts, *grad_scalars, grad_pairs, patches, texts, *scalars, pair_bias)
        return value.to(batch.dtype)

    @staticmethod
    @first_order
    def backward(ctx: Any, values: list[Any], grad_loss: Tensor) -> Gradients:
        # Out of place: a graph that is retained may ask again.
        patches, texts, scale, temperature, bias, pairs = (x if x is None else x * grad_loss for x in values[:6])
        return patches, texts, None, temperature, None, None, None, scale, bias, None, None, None, pairs, *(None,) * 4


class _Batch:
    """Loss and gradients of this process's images, added up over blocks of texts.

    `sums` and the texts' gradient are sums over pairs. Gradients of patches and of the pair bias are divided by the
    number of this process's images, as operators do.
    """

    def __init__(
        self, inputs: Inputs, logit_scale: Scalar, logit_bias: Scalar | None, pairs: Pairs, options: Options,
        plan: Plan, sizes: Tensor, needs: tuple[bool, ...],
    ):  # fmt: skip
        self.inputs, self.scalars, self.pairs = inputs, (*ops.pair(logit_scale), *ops.pair(logit_bias)), pairs
        self.options, self.plan, self.needs, self.images = options, plan, needs, inputs.images
        self.dtype = torch.promote_types(inputs.patches.dtype, torch.float32)
        self.packed = inputs.text_lengths is not None
        self.valid = valid_columns(sizes, plan)
        # Loss, gradients of logit scale, temperature and logit bias, and the number of images.
        self.sums = self._zeros(5, dtype=torch.float64)
        self.sums[4] = self.images
        self.grad_patches: Tensor | None = None  # until the first block
        self.grad_pairs = self._zeros(self.images, plan.world * plan.capacity) if needs[5] else None

    def ring(self) -> Tensor | None:
        """Add the texts of one process after the other; return ∂L/∂T `[plan.rows, ...]` of the own texts."""
        plan, shape = self.plan, self.inputs.texts.shape[1:]
        travelling: Any = None  # a tensor after the first visit

        def visit(blocks: Blocks) -> None:
            nonlocal travelling
            first = blocks[0][0].start
            end = plan.real(first // plan.capacity).stop
            grad = self._zeros(plan.rows, *shape)
            for at, block in blocks:
                if self.packed:
                    self._add(at, block, grad)
                    continue
                at = slice(at.start, min(at.stop, end))
                if at.start < at.stop:
                    self._add(at, block[: at.stop - at.start], grad[at.start - first : at.stop - first])
            if self.needs[1]:
                if travelling is not None:
                    grad.add_(collectives.wait(travelling))
                travelling = collectives.hop(grad, plan)

        send_round(self.inputs, plan, visit)
        return collectives.wait(travelling) if self.needs[1] else None

    def gather(self) -> Tensor | None:
        """Add the own texts, then all others at once; return ∂L/∂T `[plan.rows, ...]` of the own texts."""
        plan, texts = self.plan, self.inputs.texts
        gathered = collectives.all_gather(padded(texts, plan), plan.world, plan.group)
        grad = self._zeros(plan.world * plan.rows, *texts.shape[1:])
        if self.packed:
            gathered = collectives.wait(gathered)
            for (at, block), part in zip(blocks_of(self.inputs, gathered, plan), grad.split(plan.rows), strict=True):
                self._add(at, block, part)
            return collectives.reduce_scatter(grad, plan) if self.needs[1] else None
        first = plan.columns(plan.rank).start
        own = slice(first, first + texts.shape[0])
        self._add(own, texts, grad[own])
        gathered = collectives.wait(gathered)
        others = [plan.real(rank) for rank in range(plan.world) if rank != plan.rank]
        parts = [torch.arange(at.start, at.stop, device=texts.device) for at in others]
        if parts:
            columns = torch.cat(parts)
            part = self._zeros(columns.shape[0], *texts.shape[1:])
            self._add(columns, gathered[columns], part)
            grad.index_copy_(0, columns, part)
        return collectives.reduce_scatter(grad, plan) if self.needs[1] else None

    def _zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.inputs.patches.new_zeros(shape, dtype=dtype or self.dtype)

    def _add(self, at: slice | Tensor, texts: Tensor, grad_texts: Tensor) -> None:
        """Add the pairs with `texts` `[n, D]`, columns `at` of all; write ∂L/∂T if it is needed."""
        pairs = self.pairs.columns(at)
        if self.plan.sizes is None or self.packed:  # padding could not be cut off: its pairs are taken out
            out = self._zeros(self.images, self.valid[at].shape[0]).masked_fill_(~self.valid[at], float("-inf"))
            pairs = pairs._replace(pair_bias=out if pairs.pair_bias is None else out.add_(pairs.pair_bias))
        inputs = of_block(self.inputs, at, texts)
        value, scalars, grad_patches, grad_pairs = self._step(inputs, pairs, grad_texts if self.needs[1] else None)
        for i, x in enumerate((value, *scalars)):
            if x is not None:
                self.sums[i] += x * self.images
        if self.needs[1]:
            grad_texts.mul_(self.images)
        if grad_patches is not None:
            wide = self.grad_patches
            self.grad_patches = grad_patches.to(self.dtype) if wide is None else wide.add_(grad_patches)
        if self.grad_pairs is not None and grad_pairs is not None:
            self.grad_pairs[:, at] = grad_pairs

    def _step(
        self, inputs: Inputs, pairs: Pairs, grad_texts: Tensor | None
    ) -> tuple[Tensor, list[Tensor | None], Tensor | None, Tensor | None]:
        """Return the loss of some pairs and its gradients: those of three scalars, of patches and of the pair bias.

        The choice between the two ways is this process's own, because processes may differ in N.
        """
        patches, texts, patch_mask, attn_temperature, *_ = inputs
        backend, form = self.options.backend, self.options.form
        needs_patches, needs_texts, *needs_scalars, needs_pairs = self.needs
        value = self._zeros()
        scale, temperature, bias = scalars = [value.new_empty(()) if needed else None for needed in needs_scalars]
        grad_pairs = self._zeros(self.images, inputs.text_count) if needs_pairs else None
        grad_patches = None
        if in_one_pass(self.options, inputs):
            grad_patches = patches.new_empty(patches.shape) if needs_patches else None
            ops.sigmoid_step(
                patches, texts, patch_mask, *ops.pair(attn_temperature), *self.scalars, *pairs, form, backend,
                value, grad_patches, grad_texts, temperature, scale, bias, grad_pairs, inputs.patch_lengths,
            )  # fmt: skip
            return value, scalars, grad_patches, grad_pairs
        phi, state = compatibility(inputs, self.options)
        grad_phi = torch.empty_like(phi)
        ops.pair_loss_forward(phi, *self.scalars, *pairs, "sigmoid", value, None, None)
        ops.pair_loss_backward(
            phi, *self.scalars, *pairs, "sigmoid", None, None, torch.ones_like(value),
            grad_phi, scale, bias, grad_pairs,
        )  # fmt: skip
        grad_patches, part, scalars[1] = compatibility_gradients(
            *(inputs, self.options, phi, state, grad_phi, needs_patches, needs_texts, needs_scalars[1], self.dtype)
        )
        if grad_texts is not None and part is not None:
            grad_texts.copy_(part)
        return value, scalars, grad_patches, grad_pairs
