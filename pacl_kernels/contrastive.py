"""The losses over logits `[B, K]` and their gradients, for all columns at once or a block of them at a time.

The pairs may lie anywhere: row i belongs to column `pairs + i`. Rows are complete in one process; columns may go on in
others, so their sums are handed out before they are finished (`Sums`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class LogSumExp(NamedTuple):
    """`largest + log`, kept apart: their sum would round away a saturated loss (log 1e-6 beside a maximum of 100)."""

    largest: Tensor
    log: Tensor


class Sums(NamedTuple):
    """`Σ exp(z) = total exp(largest)`, which can still be added to."""

    largest: Tensor
    total: Tensor

    def finish(self) -> LogSumExp:
        return LogSumExp(self.largest, self.total.log())


def sums(logits: Tensor, dim: int) -> Sums:
    """Of exp(logits) along `dim`; a line of nothing but -inf has the total 0."""
    largest = logits.amax(dim)
    finite = largest.masked_fill(largest == float("-inf"), 0.0)
    return Sums(finite, (logits - finite.unsqueeze(dim)).exp_().sum(dim))


def merge(a: Sums, b: Sums) -> Sums:
    largest = torch.maximum(a.largest, b.largest)
    return Sums(largest, a.total * (a.largest - largest).exp() + b.total * (b.largest - largest).exp())


def infonce(pair: Tensor, rows: LogSumExp, columns: LogSumExp) -> Tensor:
    """Mean of row and column cross-entropy, of the pairs' logits `[B]` and the log-sums of their rows and columns."""
    return (cross_entropy(pair, rows).mean() + cross_entropy(pair, columns).mean()) / 2


def cross_entropy(pair: Tensor, lines: LogSumExp) -> Tensor:
    return lines.largest - pair + lines.log


def infonce_gradient(logits: Tensor, rows: LogSumExp, columns: LogSumExp, pairs: int | None) -> Tensor:
    """2 B times the gradient, in place of `logits`, a block of columns; `pairs` is None if it holds no pair."""
    by_column = (logits - columns.largest).sub_(columns.log).exp_()
    grad = logits.sub_(rows.largest[:, None]).sub_(rows.log[:, None]).exp_().add_(by_column)
    if pairs is not None:
        grad.diagonal(pairs).sub_(2.0)
    return grad


def sigmoid(logits: Tensor, pairs: int | None) -> Tensor:
    """B times the sigmoid loss of a block of columns, in place of `logits`."""
    if pairs is not None:
        logits.diagonal(pairs).neg_()
    return F.softplus(logits).sum()


def sigmoid_gradient(logits: Tensor, pairs: int | None) -> Tensor:
    """B times the gradient, in place of `logits`."""
    if pairs is not None:
        logits.diagonal(pairs).neg_()
    grad = logits.sigmoid_()
    if pairs is not None:
        grad.diagonal(pairs).neg_()
    return grad
