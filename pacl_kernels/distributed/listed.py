"""The loss of the global batch over lists of texts, which count in the texts of all processes.

All texts are gathered, as they are without lists; each process computes φ `[B_local, M]` of its own lists. The columns,
which continue in other processes, are combined as in `labelled.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import contrastive, lists, pairs
from ..autograd import Gradients, Options, first_order, keep, like, of_inputs
from ..backends import takes_lists
from ..checks import Inputs, Scalar
from ..contrastive import scalar
from ..list_autograd import gradients, score
from ..pairs import Pairs
from . import collectives, labelled
from .collectives import Plan, padded
from .texts import with_all_layouts


def check_range(text_index: Tensor, plan: Plan) -> None:
    """Raise ValueError for an index beyond the texts of all processes, where the host knows their number."""
    if plan.sizes is None or text_index.is_cuda or torch.compiler.is_compiling():
        return
    count = sum(plan.sizes)
    if int(text_index.max()) >= count:
        raise ValueError(
            f"text_index has {int(text_index.max())}, expected the number of one of the {count} texts of all "
            "processes, or -1 for none"
        )


class GlobalListedFunction(torch.autograd.Function):
    """Loss (0-D) of the global batch, the same in every process; gradients are those of `GlobalPaclFunction`.

    `text_index` `[B_local, M]` has numbers of texts of all processes in the order of their ranks, each at most once in
    a list, and -1 for none. Targets and pair bias are `[B_local, M]`.
    """

    @staticmethod
    def forward(
        ctx: Any, patches: Tensor, texts: Tensor, patch_mask: Tensor | None, attn_temperature: Scalar,
        patch_lengths: Tensor | None, text_mask: Tensor | None, text_lengths: Tensor | None, logit_scale: Scalar,
        logit_bias: Scalar | None, image_ids: Tensor | None, text_ids: Tensor | None, targets: Tensor | None,
        pair_bias: Tensor | None, text_index: Tensor, options: Options, plan: Plan, headers: Tensor,
    ) -> Tensor:  # fmt: skip
        if not takes_lists(options.backend, options.normalize):
            options = options._replace(backend="torch")
        ctx.options, ctx.plan = options, plan
        gathered = collectives.all_gather(padded(texts, plan), plan.world, plan.group)
        inputs = Inputs(patches, texts, patch_mask, attn_temperature, patch_lengths, text_mask, text_lengths)
        inputs = with_all_layouts(inputs, plan)
        given = Pairs(image_ids, text_ids, targets, pair_bias)
        sums = _Sums(plan, options.loss, logit_scale, logit_bias, headers, given, text_index.shape[0])
        text_index = sums.open(text_index)
        inputs = inputs._replace(texts=collectives.wait(gathered))
        phi, state = score(*_of_gathered(inputs, text_index, plan), options)
        sums.add_lists(text_index, phi)
        value, saved = sums.finish()
        keep(ctx, *inputs, logit_scale, logit_bias, text_index, texts, phi, state, *saved)
        return value

    @staticmethod
    @first_order
    def backward(ctx: Any, values: list[Any], grad_loss: Tensor) -> Gradients:
        plan, options, needs = ctx.plan, ctx.options, ctx.needs_input_grad
        inputs = Inputs(*values[:7])
        logit_scale, logit_bias, text_index, texts, phi, state, *saved = values[7:]
        needs_temperature, (needs_scale, needs_bias) = needs[3], needs[7:9]
        grad = _gradient(plan, options.loss, (logit_scale, logit_bias), text_index, phi, saved, grad_loss)
        grad_pair_bias = grad.clone() if needs[12] else None
        sums = torch.zeros(3, dtype=torch.float64, device=phi.device)  # gradients of scale, temperature and bias
        if needs_scale:
            sums[0] = contrastive.total(grad * phi)
        if needs_bias and options.loss == "sigmoid":  # InfoNCE does not depend on it
            sums[2] = contrastive.total(grad)
        grad_phi = grad.mul_(scalar(logit_scale, phi.dtype))
        grad_patches, grad_texts, grad_temperature = gradients(
            *(*_of_gathered(inputs, text_index, plan), options, phi, state, grad_phi, needs, phi.dtype)
        )
        if grad_temperature is not None:
            sums[1] = grad_temperature
        if grad_texts is not None:
            own = collectives.reduce_scatter(grad_texts, plan)
            grad_texts = own[: texts.shape[0]].to(texts.dtype, copy=True)
        if needs_scale or needs_temperature or needs_bias:
            sums = collectives.wait(collectives.all_reduce(sums / plan.world, plan))
        of_scalars = (
            like(sums[0], logit_scale) if needs_scale else None,
            like(sums[2], logit_bias) if needs_bias else None,
        )
        return (
            *of_inputs(inputs, grad_patches, grad_texts, sums[1] if needs_temperature else None),
            *(*of_scalars, None, None, None, grad_pair_bias, None, None, None, None),
        )


def _of_gathered(inputs: Inputs, text_index: Tensor, plan: Plan) -> tuple[Inputs, Tensor]:
    """Return the inputs of φ and the lists, where the padding of packed texts is one more text of each process."""
    if inputs.text_lengths is None:
        return inputs, text_index
    lengths = inputs.text_lengths.view(plan.world, plan.capacity)
    lengths = torch.cat((lengths, plan.rows - lengths.sum(1, keepdim=True)), 1).flatten()
    more = torch.div(text_index, plan.capacity, rounding_mode="floor")
    return inputs._replace(text_lengths=lengths), torch.where(text_index < 0, -1, text_index + more)


class _Sums(labelled.Sums):
    """Sums of the loss, from φ of all lists of this process at once."""

    def open(self, text_index: Tensor) -> Tensor:
        """Return the lists as columns of the texts as they travel; wait for the numbers of texts."""
        self.sizes = collectives.wait(self.headers)[:, 0].clone()
        ids = self.given._replace(targets=None, pair_bias=None)
        if self.given.targets is None:
            ids = labelled.with_padding(ids, self.images, self.sizes, self.plan)
        self.padded = ids._replace(targets=self.given.targets, pair_bias=self.given.pair_bias)
        return labelled.columns_of(text_index, self.sizes, self.plan)

    def add_lists(self, text_index: Tensor, phi: Tensor) -> None:
        self.dtype = phi.dtype
        scale, bias = (scalar(x, phi.dtype) for x in self.scalars)
        assert scale is not None
        logits, targets = lists.logits_and_targets(phi, scale, bias, self.padded, text_index)
        if self.loss == "sigmoid":
            self.total = pairs.sigmoid(logits, targets).double()
            return
        self.rows = pairs.line_sums(logits, targets, 1)
        count = self.plan.world * self.plan.capacity
        self.columns = [(slice(0, count), lists.column_sums(logits, targets, text_index, count))]


def _gradient(
    plan: Plan, loss: str | None, scalars: tuple[Scalar, Scalar | None], text_index: Tensor, phi: Tensor,
    saved: list[Any], grad_loss: Tensor,
) -> Tensor:  # fmt: skip
    """Return the gradient of the logits `[B_local, M]`, times the number of processes."""
    _, *padded, first, second = saved if loss != "sigmoid" else (*saved, None)
    scale, bias = (scalar(x, phi.dtype) for x in scalars)
    assert scale is not None
    statistics = (None, None) if loss == "sigmoid" else (first, second)
    grad = lists.logits_gradient(phi, scale, bias, Pairs(*padded), text_index, str(loss), *statistics)
    factor = grad_loss * plan.world
    return grad.mul_((factor / first).to(phi.dtype) if loss == "sigmoid" else factor)
