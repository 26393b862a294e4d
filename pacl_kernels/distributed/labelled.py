"""The loss of the global batch with any positives: ids, targets and a bias of each pair.

Ids of all texts are gathered, 8 bytes each. Targets and bias are this process's rows `[B_local, K_global]`; their
columns are the texts in the order of the ranks, without the padding that texts travel with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import pairs
from ..checks import Scalar
from ..contrastive import scalar
from ..pairs import Lines, Pairs, Statistics
from . import collectives
from .collectives import Plan
from .diagonal import valid_columns


class Sums:
    """Accumulator of the loss of the global batch, from φ one block of columns at a time."""

    def __init__(
        self, plan: Plan, loss: str | None, logit_scale: Scalar, logit_bias: Scalar | None, headers: Tensor,
        given: Pairs, images: int,
    ):  # fmt: skip
        self.plan, self.loss, self.scalars, self.headers = plan, loss, (logit_scale, logit_bias), headers
        self.given, self.images = given, images
        self.padded: Any = None  # Pairs with padded columns, after the first block
        self.rows: Any = None  # Lines after the first block
        self.columns: list[tuple[slice, Lines]] = []
        self.total: Any = 0.0  # a tensor after the first block

    def add(self, at: slice, phi: Tensor) -> None:
        if self.padded is None:  # wait only after the first block has been scored
            self.sizes = collectives.wait(self.headers)[:, 0].clone()
            self.valid, self.dtype = valid_columns(self.sizes, self.plan), phi.dtype
            self.padded = with_padding(self.given, self.images, self.sizes, self.plan)
        logits, targets = _logits_and_targets(at, phi, self.scalars, self.padded, self.valid)
        if self.loss == "sigmoid":
            self.total = self.total + pairs.sigmoid(logits, targets).double()
            return
        rows = pairs.line_sums(logits, targets, 1)
        self.rows = rows if self.rows is None else pairs.merge(self.rows, rows)
        self.columns.append((at, pairs.line_sums(logits, targets, 0)))

    def finish(self) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """Return the loss, and what its gradient needs.

        The sigmoid loss takes one all-reduce; InfoNCE takes two, because a pair's bias may have any size: the columns
        need a common maximum before their exponentials can be added.
        """
        if self.loss == "sigmoid":
            parts = torch.stack((self.total, torch.full_like(self.total, self.images)))
            total, images = collectives.wait(collectives.all_reduce(parts, self.plan))
            return (total / images).to(self.dtype), (self.sizes, *self.padded, images)
        columns = Lines(*map(torch.cat, zip(*(x for _, x in sorted(self.columns, key=_first)), strict=True)))
        largest = collectives.wait(collectives.all_reduce(columns.largest, self.plan, "max"))
        columns, rows = (Lines(*(x.double() for x in lines)) for lines in (columns, self.rows))
        own = torch.stack((pairs.cross_entropy(rows).sum(), pairs.count(rows).double()))
        sums = torch.cat((*columns.shifted(largest.double()), own))
        sums = collectives.wait(collectives.all_reduce(sums, self.plan))
        parts, (total, number) = sums[:-2].unflatten(0, (3, -1)), sums[-2:]
        columns = Lines(largest.double(), *parts)
        number_of_columns = pairs.count(columns)
        by_column = pairs.cross_entropy(columns).sum() / number_of_columns.clamp_min(1)
        value = (total / number.clamp_min(1) + by_column) / 2
        of_lines = pairs.statistics(rows, number), pairs.statistics(columns, number_of_columns)
        statistics = [torch.stack(x).to(self.dtype) for x in of_lines]
        return value.to(self.dtype), (self.sizes, *self.padded, *statistics)


class Gradient:
    """Gradient of the loss with respect to the logits, one block of columns at a time."""

    def __init__(
        self, plan: Plan, loss: str | None, logit_scale: Scalar, logit_bias: Scalar | None,
        saved: Sequence[Any], grad_loss: Tensor,
    ):  # fmt: skip
        sizes, *padded = saved[:5]
        self.loss, self.scalars, self.pairs, self.statistics = (
            loss,
            (logit_scale, logit_bias),
            Pairs(*padded),
            saved[5:],
        )
        self.valid, self.factor = valid_columns(sizes, plan), grad_loss * plan.world

    def __call__(self, at: slice, phi: Tensor) -> Tensor:
        logits, targets = _logits_and_targets(at, phi, self.scalars, self.pairs, self.valid)
        if self.loss == "sigmoid":
            (images,) = self.statistics
            return pairs.sigmoid_gradient(logits, targets).mul_((self.factor / images).to(phi.dtype))
        rows, columns = self.statistics
        grad = pairs.gradient(logits, targets, Statistics(*rows), Statistics(*columns[:, at]))
        return grad.mul_(self.factor)


def _first(column: tuple[slice, Lines]) -> int:
    return int(column[0].start)


def _logits_and_targets(
    at: slice, phi: Tensor, scalars: tuple[Scalar, Scalar | None], padded: Pairs, valid: Tensor
) -> tuple[Tensor, Tensor]:
    scale, bias = scalars
    logits, targets = pairs.logits_and_targets(
        phi, scalar(scale, phi.dtype), scalar(bias, phi.dtype), padded.columns(at)
    )
    return logits.masked_fill_(~valid[at], float("-inf")), targets


def with_padding(given: Pairs, images: int, sizes: Tensor, plan: Plan) -> Pairs:
    """Return the pairs with the columns of the texts as they travel.

    Padding has an id that no image has, target 0 and bias 0.
    """
    image_ids, text_ids, targets, bias = given
    if targets is None:
        if image_ids is None or text_ids is None:  # text i of a process belongs to its image i
            first = plan.columns(plan.rank).start
            image_ids = torch.arange(first, first + images, device=sizes.device)
            text_ids = torch.arange(plan.world * plan.capacity, device=sizes.device)
        else:
            text_ids = F.pad(text_ids, (0, plan.capacity - text_ids.shape[0]), value=-1)
            text_ids = collectives.wait(collectives.all_gather(text_ids, plan.world, plan.group))
    return Pairs(image_ids, text_ids, *(x if x is None else _spread(x, sizes, plan) for x in (targets, bias)))


def _spread(x: Tensor, sizes: Tensor, plan: Plan) -> Tensor:
    if x.shape[1] == plan.world * plan.capacity:
        return x
    into = x.new_zeros(x.shape[0], plan.world * plan.capacity)
    return into.index_copy_(1, places(x.shape[1], sizes, plan), x)


def gather(padded: Tensor, count: int, sizes: Tensor, plan: Plan) -> Tensor:
    """Return the columns of the `count` texts of all processes, without the padding."""
    return padded if count == padded.shape[1] else padded.index_select(1, places(count, sizes, plan))


def check_columns(given: Sequence[Tensor | None], plan: Plan) -> None:
    """Raise ValueError unless targets and bias have a column for each text of all processes."""
    if plan.sizes is None:
        return  # only the device knows their number
    for name, x in zip(("targets", "pair_bias"), given[2:], strict=True):
        if x is not None and x.shape[1] != sum(plan.sizes):
            raise ValueError(
                f"{name} has shape {list(x.shape)}, expected [{x.shape[0]}, {sum(plan.sizes)}], a column for each text "
                "of all processes in the order of their ranks"
            )


def places(count: int, sizes: Tensor, plan: Plan) -> Tensor:
    """Return the padded columns of the `count` texts of all processes; nothing waits for the device."""
    return columns_of(torch.arange(count, device=sizes.device), sizes, plan)


def columns_of(text: Tensor, sizes: Tensor, plan: Plan) -> Tensor:
    """Return the padded columns of texts by their numbers among all processes, -1 for a number of no text."""
    ends = sizes.cumsum(0)
    rank = torch.searchsorted(ends, text.contiguous(), right=True).clamp_max(plan.world - 1)
    columns = rank * plan.capacity + text - (ends - sizes)[rank]
    return columns.masked_fill((text < 0) | (text >= ends[-1]), -1)
