"""The losses over logits `[B, K]` and their gradients, in plain PyTorch.

`loss_forward` and `loss_backward` take all pairs of one process; every backend without kernels for the loss uses them.
The functions below them take one block of columns at a time, for the batch of many processes. In such a block row i
pairs with column `pairs + i`. Each row is complete in one process, but a column may continue in others, so column sums
are returned before their logarithm is taken (`Sums`).
"""

from __future__ import annotations

from typing import NamedTuple, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from .checks import Scalar


def loss_forward(
    phi: Tensor, scale: Scalar, bias: Scalar | None, loss: str, value: Tensor, statistics: Tensor | None
) -> None:
    """Write the loss (0-D) of φ `[B, B]`, and for InfoNCE `statistics` `[4, B]`.

    The statistics are maximum and log-sum of the rows, then maximum and log-sum of the columns.
    """
    logits = logits_of(phi, scale, bias)
    if loss == "sigmoid":
        value.copy_(sigmoid(logits, 0) / logits.shape[0])
        return
    rows, columns = (sums(logits, dim).finish() for dim in (1, 0))
    assert statistics is not None  # the caller allocates them for InfoNCE
    value.copy_(infonce(logits.diagonal(), rows, columns))
    torch.stack((*rows, *columns), out=statistics)


def loss_backward(
    phi: Tensor,
    scale: Scalar,
    bias: Scalar | None,
    loss: str,
    statistics: Tensor | None,
    grad_loss: Tensor,
    grad_phi: Tensor,
    grad_scale: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    """Write ∂L/∂φ `[B, B]` and, where a buffer is given, the gradients (0-D) of logit scale and bias."""
    logits = logits_of(phi, scale, bias, out=grad_phi)
    if loss == "sigmoid":
        grad = sigmoid_gradient(logits, 0).div_(logits.shape[0])
    else:
        assert statistics is not None
        lines = statistics.unbind()
        rows, columns = LogSumExp(*lines[:2]), LogSumExp(*lines[2:])
        grad = infonce_gradient(logits, rows, columns, 0).div_(2 * logits.shape[0])
    grad.mul_(grad_loss)
    if grad_scale is not None:
        grad_scale.copy_(total(grad * phi))
    if grad_bias is not None:
        grad_bias.copy_(total(grad))
    grad.mul_(scale)


@overload
def scalar(value: Scalar, dtype: torch.dtype) -> Scalar: ...


@overload
def scalar(value: Scalar | None, dtype: torch.dtype) -> Scalar | None: ...


def scalar(value: Scalar | None, dtype: torch.dtype) -> Scalar | None:
    """Return a number or None unchanged, and a tensor of one element as 0-D in `dtype`, so that it adds no axis."""
    return value.to(dtype).reshape(()) if isinstance(value, Tensor) else value


def logits_of(phi: Tensor, scale: Scalar, bias: Scalar | None, out: Tensor | None = None) -> Tensor:
    """Return `scale * phi + bias`; scalars must be those that `scalar` returns."""
    logits = torch.mul(phi, scale, out=out)
    return logits if bias is None else logits.add_(bias)


def total(x: Tensor) -> Tensor:
    """Return the sum (0-D) of a matrix, row by row: PyTorch's order over a whole matrix depends on the threads."""
    return x.sum(1).sum()


def softplus(x: Tensor) -> Tensor:
    """Return log(1 + exp(x)). PyTorch's own rounds an element by its place in the part of a thread."""
    return F.logsigmoid(-x).neg_()


def logistic_(x: Tensor) -> Tensor:
    """Overwrite x with 1 / (1 + exp(-x)), in place of PyTorch's `sigmoid` for the reason of `softplus`."""
    return x.neg_().exp_().add_(1.0).reciprocal_()


class LogSumExp(NamedTuple):
    """Log-sum-exp as two terms, `largest + log`: in their sum a maximum of 100 would round away a log of 1e-6."""

    largest: Tensor
    log: Tensor


class Sums(NamedTuple):
    """Unfinished log-sum-exp, `Σ exp(z) = total * exp(largest)`; `merge` adds two of them."""

    largest: Tensor
    total: Tensor

    def finish(self) -> LogSumExp:
        return LogSumExp(self.largest, self.total.log())


def sums(logits: Tensor, dim: int) -> Sums:
    """Sum exp(logits) along `dim`; the total is 0 where all logits are -inf."""
    largest = logits.amax(dim)
    finite = largest.masked_fill(largest == float("-inf"), 0.0)
    return Sums(finite, (logits - finite.unsqueeze(dim)).exp_().sum(dim))


def merge(a: Sums, b: Sums) -> Sums:
    largest = torch.maximum(a.largest, b.largest)
    return Sums(largest, a.total * (a.largest - largest).exp() + b.total * (b.largest - largest).exp())


def infonce(pair: Tensor, rows: LogSumExp, columns: LogSumExp) -> Tensor:
    """Return the mean of row and column cross-entropy from the pairs' logits `[B]` and their log-sum-exps."""
    return (cross_entropy(pair, rows).mean() + cross_entropy(pair, columns).mean()) / 2


def cross_entropy(pair: Tensor, lines: LogSumExp) -> Tensor:
    return lines.largest - pair + lines.log


def infonce_gradient(logits: Tensor, rows: LogSumExp, columns: LogSumExp, pairs: int | None) -> Tensor:
    """Overwrite `logits`, a block of columns, with 2 B times the gradient; `pairs` is None if the block has no pair."""
    by_column = (logits - columns.largest).sub_(columns.log).exp_()
    grad = logits.sub_(rows.largest[:, None]).sub_(rows.log[:, None]).exp_().add_(by_column)
    if pairs is not None:
        grad.diagonal(pairs).sub_(2.0)
    return grad


def sigmoid(logits: Tensor, pairs: int | None) -> Tensor:
    """Return B times the sigmoid loss of a block of columns; overwrites `logits`."""
    if pairs is not None:
        logits.diagonal(pairs).neg_()
    return total(softplus(logits))


def sigmoid_gradient(logits: Tensor, pairs: int | None) -> Tensor:
    """Overwrite `logits` with B times the gradient of the sigmoid loss."""
    if pairs is not None:
        logits.diagonal(pairs).neg_()
    grad = logistic_(logits)
    if pairs is not None:
        grad.diagonal(pairs).neg_()
    return grad
