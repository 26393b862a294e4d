"""The losses over `[B, K]` pairs with any positives: ids, targets and a bias of each pair, and their gradients.

`contrastive.py` has the default, where text i belongs to image i and the backends have kernels. Here a pair has a
target t >= 0, 1 where the ids of image and text are equal. With logits z and R, the sum of a line's targets (an image's
row or a text's column), a line of the InfoNCE loss is

    log Σ exp(z) - Σ t z / R,      averaged over the rows with R > 0, and over the columns with R > 0.

The sigmoid loss is `-Σ t log σ(z) + (1 - t) log σ(-z)`, divided by the number of images. A pair whose bias is -inf is
out: its target counts as 0, and so does its term.

All functions take a block of pairs, so that the batch of many processes can be computed one block of columns at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import Scalar
from .contrastive import logistic_, logits_of, softplus, total

ROW_BYTES = 8 * 2**20  # size of each temporary array of `loss_forward` and `loss_backward`


class Pairs(NamedTuple):
    """Positives and bias of the pairs of images and texts; the arguments of `fused_pacl_loss`, checked.

    Ids are int64 `[B]` and `[K]`, or there are targets `[B, K]`; targets and bias `[B, K]` have the dtype of φ.
    """

    image_ids: Tensor | None
    text_ids: Tensor | None
    targets: Tensor | None
    pair_bias: Tensor | None

    def rows(self, at: slice) -> Pairs:
        """Return the pairs of some of the images."""
        return Pairs(*(x if x is None or x is self.text_ids else x[at] for x in self))

    def columns(self, at: slice | Tensor) -> Pairs:
        """Return the pairs of some of the texts, a range or a list of indices."""
        text_ids = None if self.text_ids is None else self.text_ids[at]
        return Pairs(self.image_ids, text_ids, *(x if x is None else x[:, at] for x in (self.targets, self.pair_bias)))


class Lines(NamedTuple):
    """Sums over the pairs of a line, `[B]` for rows or `[K]` for columns; `merge` adds two parts of the same lines."""

    largest: Tensor  # the largest logit m
    total: Tensor  # Σ exp(z - m)
    weight: Tensor  # R = Σ t
    positive: Tensor  # Σ t (z - m)

    def shifted(self, largest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the three sums relative to another m, of at least the same size."""
        down = self.largest - largest
        return self.total * down.exp(), self.weight, self.positive + self.weight * down


class Statistics(NamedTuple):
    """Four numbers of each line that the gradient needs; all but the first are 0 for a line without a positive."""

    largest: Tensor
    log: Tensor  # of the total: the log-sum-exp is `largest + log`
    share: Tensor  # 1 / (number of lines with a positive)
    target_share: Tensor  # share / R


def logits_and_targets(phi: Tensor, scale: Scalar, bias: Scalar | None, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Return new arrays of the block's logits and targets."""
    logits = logits_of(phi, scale, bias)
    if pairs.targets is not None:
        targets = pairs.targets
    else:
        assert pairs.image_ids is not None and pairs.text_ids is not None
        images = pairs.image_ids[:, None]
        targets = ((images == pairs.text_ids) & (images >= 0)).to(phi.dtype)
    if pairs.pair_bias is not None:
        logits = logits.add_(pairs.pair_bias)
        targets = targets.masked_fill(pairs.pair_bias == float("-inf"), 0.0)
    return logits, targets


def line_sums(logits: Tensor, targets: Tensor, dim: int) -> Lines:
    """Sum over the texts of each row (dim 1), or over the images of each column (dim 0)."""
    largest = logits.amax(dim)
    largest = largest.masked_fill(largest == float("-inf"), 0.0)
    shifted = logits - largest.unsqueeze(dim)
    positive = torch.where(targets == 0, 0.0, targets * shifted).sum(dim)  # not 0 × -inf
    return Lines(largest, shifted.exp_().sum(dim), targets.sum(dim), positive)


def merge(a: Lines, b: Lines) -> Lines:
    largest = torch.maximum(a.largest, b.largest)
    return Lines(largest, *(x + y for x, y in zip(a.shifted(largest), b.shifted(largest), strict=True)))


def count(lines: Lines) -> Tensor:
    """Return the number (0-D) of lines that have a positive."""
    return (lines.weight > 0).sum()


def cross_entropy(lines: Lines) -> Tensor:
    """Return the cross-entropy of each line, 0 for a line without a positive."""
    return torch.where(lines.weight > 0, lines.total.log() - lines.positive / lines.weight, 0.0)


def statistics(lines: Lines, count: Tensor) -> Statistics:
    """Return what the gradient needs of lines; `count` of all lines of the batch have a positive."""
    positive = lines.weight > 0
    share = positive.to(lines.weight.dtype) / count.clamp_min(1)
    return Statistics(
        lines.largest,
        torch.where(positive, lines.total.log(), 0.0),
        share,
        torch.where(positive, share / lines.weight, 0.0),
    )


def gradient(logits: Tensor, targets: Tensor, rows: Statistics, columns: Statistics) -> Tensor:
    """Overwrite a block's logits with the gradient of the InfoNCE loss."""
    by_column = (logits - columns.largest).sub_(columns.log).exp_().mul_(columns.share)
    by_row = logits.sub_(rows.largest[:, None]).sub_(rows.log[:, None]).exp_().mul_(rows.share[:, None])
    target_shares = rows.target_share[:, None] + columns.target_share
    return by_row.add_(by_column).sub_(target_shares.mul_(targets)).div_(2)


def sigmoid(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the sum (0-D) of the sigmoid loss of a block."""
    positive = torch.where(targets == 0, 0.0, targets * softplus(-logits))  # not 0 × inf
    return total(positive.add_(softplus(logits).mul_(1 - targets)))


def sigmoid_gradient(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the gradient of that sum: (1 - t) σ(z) - t σ(-z), which loses no digit for a logit of any size."""
    return logistic_(logits.clone()).mul_(1 - targets).sub_(logistic_(-logits).mul_(targets))


def loss_forward(
    phi: Tensor, scale: Scalar, bias: Scalar | None, pairs: Pairs, loss: str,
    value: Tensor, row_statistics: Tensor | None, column_statistics: Tensor | None,
) -> None:  # fmt: skip
    """Write the loss (0-D) of φ `[B, K]`, and for InfoNCE the statistics `[4, B]` and `[4, K]`."""
    value.zero_()
    rows: list[Lines] = []
    columns: Lines | None = None
    for at in _row_blocks(phi):
        logits, targets = logits_and_targets(phi[at], scale, bias, pairs.rows(at))
        if loss == "sigmoid":
            value.add_(sigmoid(logits, targets))
            continue
        rows.append(line_sums(logits, targets, 1))
        part = line_sums(logits, targets, 0)
        columns = part if columns is None else merge(columns, part)
    if loss == "sigmoid":
        value.div_(phi.shape[0])
        return
    assert columns is not None and row_statistics is not None and column_statistics is not None
    for lines, into in (
        (Lines(*map(torch.cat, zip(*rows, strict=True))), row_statistics),
        (columns, column_statistics),
    ):
        number = count(lines)
        value.add_(cross_entropy(lines).sum() / number.clamp_min(1) / 2)
        torch.stack(statistics(lines, number), out=into)


def loss_backward(
    phi: Tensor, scale: Scalar, bias: Scalar | None, pairs: Pairs, loss: str,
    row_statistics: Tensor | None, column_statistics: Tensor | None, grad_loss: Tensor,
    grad_phi: Tensor, grad_scale: Tensor | None, grad_bias: Tensor | None, grad_pair_bias: Tensor | None,
) -> None:  # fmt: skip
    """Write ∂L/∂φ `[B, K]`, and the gradients whose buffers are given: of logit scale, logit bias and pair bias."""
    for sums in (grad_scale, grad_bias):
        if sums is not None:
            sums.zero_()
    for at in _row_blocks(phi):
        logits, targets = logits_and_targets(phi[at], scale, bias, pairs.rows(at))
        if loss == "sigmoid":
            grad = sigmoid_gradient(logits, targets).div_(phi.shape[0])
        else:
            assert row_statistics is not None and column_statistics is not None
            grad = gradient(logits, targets, Statistics(*row_statistics[:, at]), Statistics(*column_statistics))
        grad.mul_(grad_loss)
        if grad_scale is not None:
            grad_scale.add_(total(grad * phi[at]))
        if grad_bias is not None:
            grad_bias.add_(total(grad))
        if grad_pair_bias is not None:
            grad_pair_bias[at] = grad
        torch.mul(grad, scale, out=grad_phi[at])


def _row_blocks(phi: Tensor) -> Iterator[slice]:
    """Yield blocks of images; their size depends on K alone, so that no sum depends on the machine."""
    size = max(1, ROW_BYTES // (phi.shape[1] * phi.element_size()))
    return (slice(first, min(first + size, phi.shape[0])) for first in range(0, phi.shape[0], size))
