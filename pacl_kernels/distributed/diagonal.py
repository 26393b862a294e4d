"""The default loss of the global batch: text i of a process belongs to its image i."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import contrastive
from ..checks import Scalar
from ..contrastive import scalar
from . import collectives
from .collectives import Plan


class Sums:
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
            self.valid, self.dtype = valid_columns(self.sizes, self.plan), phi.dtype
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
        """Return the loss and what its gradient needs: sizes, and for InfoNCE the log-sums of own rows and all columns.

        It takes one all-reduce.
        """
        count = self.sizes.sum()
        if self.loss == "sigmoid":
            return (collectives.wait(collectives.all_reduce(self.total, self.plan)) / count).to(self.dtype), (
                self.sizes,
            )
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
        return value.to(self.dtype), (self.sizes, *rows, largest, (logs - largest).to(self.dtype))


class Gradient:
    """Gradient of the loss with respect to the logits, one block of columns at a time."""

    def __init__(
        self, plan: Plan, loss: str | None, logit_scale: Scalar, logit_bias: Scalar | None,
        saved: Sequence[Tensor], grad_loss: Tensor,
    ):  # fmt: skip
        sizes, *self.statistics = saved
        self.plan, self.loss, self.scalars = plan, loss, (logit_scale, logit_bias)
        self.valid, self.factor = valid_columns(sizes, plan), grad_loss * plan.world / sizes.sum()

    def __call__(self, at: slice, phi: Tensor) -> Tensor:
        logits, pairs = _logits(phi, self.valid[at], *self.scalars), _pairs(at, self.plan)
        if self.loss == "sigmoid":
            grad = contrastive.sigmoid_gradient(logits, pairs)
        else:
            rows, columns = self.statistics[:2], (x[at] for x in self.statistics[2:])
            sums = contrastive.LogSumExp(*rows), contrastive.LogSumExp(*columns)
            grad = contrastive.infonce_gradient(logits, *sums, pairs).div_(2)
        return grad.mul_(self.factor)


def _logits(phi: Tensor, valid: Tensor, scale: Scalar, bias: Scalar | None) -> Tensor:
    logits = contrastive.logits_of(phi, scalar(scale, phi.dtype), scalar(bias, phi.dtype))
    return logits.masked_fill_(~valid, float("-inf"))


def _pairs(at: slice, plan: Plan) -> int | None:
    """Return the diagonal of the block that holds the pairs, or None if the block belongs to other processes."""
    own = plan.columns(plan.rank)
    return own.start - at.start if at.start < own.stop and own.start < at.stop else None


def valid_columns(sizes: Tensor, plan: Plan) -> Tensor:
    """Return bool `[B_global]`, False for padding."""
    return (torch.arange(plan.capacity, device=sizes.device) < sizes[:, None]).flatten()
