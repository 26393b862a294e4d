"""Losses of a matrix φ, and ∂L/∂φ."""

import triton
import triton.language as tl

from .shared import log_one_plus, scalar, sum_pair


@triton.jit(
    do_not_specialize=("LARGEST", "LOG", "rows_count", "length"),
    do_not_specialize_on_alignment=("stride_row", "stride"),  # still on 1, where neighbours are loaded together
)
def shifted_logsumexp_kernel(
    PHI, SCALE, BIAS, LARGEST, LOG, rows_count, length, stride_row, stride,
    SCALE_IS_TENSOR: tl.constexpr, BIAS_IS_TENSOR: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the maximum m and log Σ exp(logit - m) of each row of the logits, or of each column if strides are swapped.

    The two stay apart, because their sum would round away a saturated loss.
    """
    scale, bias = scalar(SCALE, SCALE_IS_TENSOR), scalar(BIAS, BIAS_IS_TENSOR)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    base = PHI + rows.to(tl.int64)[:, None] * stride_row
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for begin in range(0, length, BLOCK):
        cols = (begin + tl.arange(0, BLOCK)).to(tl.int64)
        known = (rows < rows_count)[:, None] & (cols < length)[None, :]
        logits = tl.load(base + cols[None, :] * stride, mask=known, other=0.0) * scale + bias
        logits = tl.where(known, logits, float("-inf"))
        raised = tl.maximum(largest, tl.max(logits, 1))
        anchor = tl.where(raised == float("-inf"), 0.0, raised)
        total = total * tl.exp(largest - anchor) + tl.sum(tl.exp(logits - anchor[:, None]), 1)
        largest = raised
    tl.store(LARGEST + rows, largest, mask=rows < rows_count)
    tl.store(LOG + rows, tl.log(total), mask=rows < rows_count)


@triton.jit(do_not_specialize=("B",))
def sigmoid_loss_kernel(
    PHI, SCALE, BIAS, SUMS, B,
    SCALE_IS_TENSOR: tl.constexpr, BIAS_IS_TENSOR: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write each program's part of Σ softplus(-y logit) to SUMS."""
    scale, bias = scalar(SCALE, SCALE_IS_TENSOR), scalar(BIAS, BIAS_IS_TENSOR)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS], tl.float32)
    for begin in range(0, B, BLOCK):
        cols = begin + tl.arange(0, BLOCK)
        known = (rows < B)[:, None] & (cols < B)[None, :]
        logits = tl.load(PHI + rows.to(tl.int64)[:, None] * B + cols[None, :], mask=known, other=0.0) * scale + bias
        x = tl.where(rows[:, None] == cols[None, :], -logits, logits)
        small = tl.exp(-tl.abs(x))
        softplus = tl.where(x > 0.0, x, 0.0) + log_one_plus(small)
        softplus = tl.where(x != x, x, softplus)
        total += tl.sum(tl.where(known, softplus, 0.0), 1)
    tl.store(SUMS + tl.program_id(0), tl.sum(total, 0))


@triton.jit(
    do_not_specialize=("ROW_LARGEST", "ROW_LOG", "COLUMN_LARGEST", "COLUMN_LOG", "SCALE_SUMS", "BIAS_SUMS", "B")
)
def loss_backward_kernel(
    PHI, SCALE, BIAS, ROW_LARGEST, ROW_LOG, COLUMN_LARGEST, COLUMN_LOG, GRAD_LOSS, GRAD_PHI, SCALE_SUMS, BIAS_SUMS, B,
    SIGMOID: tl.constexpr, SCALE_IS_TENSOR: tl.constexpr, BIAS_IS_TENSOR: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write ∂L/∂φ `[B, B]` in one pass, and each program's part of the gradients of logit scale and bias."""
    scale, bias = scalar(SCALE, SCALE_IS_TENSOR), scalar(BIAS, BIAS_IS_TENSOR)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = rows < B
    share = tl.load(GRAD_LOSS).to(tl.float32) / B
    if not SIGMOID:
        row_largest = tl.load(ROW_LARGEST + rows, mask=live, other=0.0)[:, None]
        row_log = tl.load(ROW_LOG + rows, mask=live, other=0.0)[:, None]
    scale_sum = tl.zeros([ROWS], tl.float32)
    bias_sum = tl.zeros([ROWS], tl.float32)
    for begin in range(0, B, BLOCK):
        cols = begin + tl.arange(0, BLOCK)
        known = live[:, None] & (cols < B)[None, :]
        at = rows.to(tl.int64)[:, None] * B + cols[None, :]
        phi = tl.load(PHI + at, mask=known, other=0.0)
        logits = phi * scale + bias
        pair = rows[:, None] == cols[None, :]
        if SIGMOID:
            x = tl.where(pair, -logits, logits)
            grad = 1.0 / (1.0 + tl.exp(-x))
            grad = tl.where(pair, -grad, grad) * share
        else:
            column_largest = tl.load(COLUMN_LARGEST + cols, mask=cols < B, other=0.0)[None, :]
            column_log = tl.load(COLUMN_LOG + cols, mask=cols < B, other=0.0)[None, :]
            grad = tl.exp(logits - row_largest - row_log) + tl.exp(logits - column_largest - column_log)
            grad = (grad - tl.where(pair, 2.0, 0.0)) * (0.5 * share)
        grad = tl.where(known, grad, 0.0)
        scale_part, bias_part = sum_pair(tl.where(known, grad * phi, 0.0), grad, 1)
        scale_sum += scale_part
        bias_sum += bias_part
        tl.store(GRAD_PHI + at, grad * scale, mask=known)
    tl.store(SCALE_SUMS + tl.program_id(0), tl.sum(scale_sum, 0))
    tl.store(BIAS_SUMS + tl.program_id(0), tl.sum(bias_sum, 0))
