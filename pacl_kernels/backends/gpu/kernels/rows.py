"""Inverse norms of rows, and the projection of gradients."""

import triton
import triton.language as tl

from ....constants import MIN_NORM
from .shared import round_to

MIN_NORM_SQUARED = tl.constexpr(MIN_NORM**2)


@triton.jit
def _rows(MASK, rows, rows_count, N, stride_b, stride_n, stride_mb, stride_mn, HAS_MASK: tl.constexpr):
    """Return for each row True if it exists and is not masked, and its offset in a tensor `[rows / N, N, D]`."""
    live = rows < rows_count
    image = rows // N
    n = rows - image * N
    if HAS_MASK:
        at = MASK + image.to(tl.int64) * stride_mb + n.to(tl.int64) * stride_mn
        live &= tl.load(at, mask=live, other=0) != 0
    return live, image.to(tl.int64) * stride_b + n.to(tl.int64) * stride_n


@triton.jit
def _load_row(X, offsets, live, d, D, stride_d, BLOCK_D: tl.constexpr):
    """Load `[ROWS, BLOCK_D]` in float32; rows that are not `live` are 0 and never read."""
    offs_d = (d + tl.arange(0, BLOCK_D)).to(tl.int64)
    mask = live[:, None] & (offs_d < D)[None, :]
    return tl.load(X + offsets[:, None] + (offs_d * stride_d)[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _power_of_two(inverse):
    """Return the power of two at or below 1 / ‖x‖, which scales x to a norm from 1/2 to 1; 1 for a row without norm."""
    power = (inverse.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where((inverse > 0.0) & (inverse < float("inf")) & (power > 0.0), power, 1.0)


@triton.jit(do_not_specialize=("rows_count", "N"))
def inverse_norms_kernel(
    X, MASK, INV, SCALED_X, SCALED_INV, rows_count, N, D, stride_b, stride_n, stride_d, stride_mb, stride_mn,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Write 1 / ‖x‖ of each row of `[rows / N, N, D]`; 0 for masked rows and rows without a direction.

    SCALED_X, unless None, gets the rows, contiguous, times the power of two that brings their norms to between 1/2
    and 1, and SCALED_INV gets the 1 / ‖x‖ of these rows.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live, offsets = _rows(MASK, rows, rows_count, N, stride_b, stride_n, stride_mb, stride_mn, HAS_MASK)
    SMALL: tl.constexpr = 2.0**-80  # scales any float32 so that its square is finite
    squared = tl.zeros([ROWS], tl.float32)
    small_squared = tl.zeros([ROWS], tl.float32)
    for d in range(0, D, BLOCK_D):
        x = _load_row(X, offsets, live, d, D, stride_d, BLOCK_D)
        squared += tl.sum(x * x, 1)
        x *= SMALL
        small_squared += tl.sum(x * x, 1)
    inverse = tl.where(squared < MIN_NORM_SQUARED, 0.0, 1.0 / tl.sqrt(squared))
    inverse = tl.where(squared == float("inf"), SMALL / tl.sqrt(small_squared), inverse)
    tl.store(INV + rows, inverse, mask=rows < rows_count)
    if SCALED_X is not None:
        power = _power_of_two(inverse)
        tl.store(SCALED_INV + rows, inverse / power, mask=rows < rows_count)
        for d in range(0, D, BLOCK_D):
            offs_d = d + tl.arange(0, BLOCK_D)
            x = _load_row(X, offsets, live, d, D, stride_d, BLOCK_D) * power[:, None]
            at = SCALED_X + rows.to(tl.int64)[:, None] * D + offs_d[None, :]
            inside = (rows < rows_count)[:, None] & (offs_d < D)[None, :]
            tl.store(at, x.to(SCALED_X.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=("MASK", "INV", "rows_count", "N"))
def project_out_kernel(
    GRAD, X, INV, OUT, MASK, RANGE_SCALE, rows_count, N, D, stride_b, stride_n, stride_d, stride_mb, stride_mn,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, HAS_MASK: tl.constexpr, SCALED: tl.constexpr, SCALED_X: tl.constexpr,
):  # fmt: skip
    """Write OUT = GRAD - (GRAD · x) x / ‖x‖² by rows: the part along x does not change the direction of x.

    GRAD and OUT are contiguous `[rows, D]` and may be the same memory. The projection is done twice, because the first
    leaves its own rounding along x, which is all that remains for D = 1. It starts from GRAD itself, so that the
    rounding of W along x cancels. INV has 1 / ‖x‖: the nearby power of two makes ‖x‖² near 1 for every x. SCALED_X:
    GRAD is the gradient of the rows that `inverse_norms_kernel` has scaled.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live, offsets = _rows(MASK, rows, rows_count, N, stride_b, stride_n, stride_mb, stride_mn, HAS_MASK)
    at = rows.to(tl.int64) * D
    power = _power_of_two(tl.load(INV + rows, mask=live, other=1.0))
    squared = tl.zeros([ROWS], tl.float32)
    along = tl.zeros([ROWS], tl.float32)
    for d in range(0, D, BLOCK_D):
        x = _load_row(X, offsets, live, d, D, stride_d, BLOCK_D) * power[:, None]
        grad = _load_row(GRAD, at, live, d, D, 1, BLOCK_D)
        squared += tl.sum(x * x, 1)
        along += tl.sum(grad * x, 1)
    inverse = tl.where(squared < MIN_NORM_SQUARED, 0.0, 1.0 / squared)
    along *= inverse
    rest = tl.zeros([ROWS], tl.float32)
    for d in range(0, D, BLOCK_D):
        x = _load_row(X, offsets, live, d, D, stride_d, BLOCK_D) * power[:, None]
        grad = _load_row(GRAD, at, live, d, D, 1, BLOCK_D)
        rest += tl.sum((grad - along[:, None] * x) * x, 1)
    rest *= inverse
    undo = 1.0 / tl.load(RANGE_SCALE) if SCALED else 1.0
    # For a row without a direction W = 0, hence GRAD = 0 already.
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        x = _load_row(X, offsets, live, d, D, stride_d, BLOCK_D) * power[:, None]
        grad = _load_row(GRAD, at, live, d, D, 1, BLOCK_D)
        out = (grad - along[:, None] * x - rest[:, None] * x) * undo
        if SCALED_X:
            out *= power[:, None]
        inside = (rows < rows_count)[:, None] & (offs_d < D)[None, :]
        tl.store(OUT + at[:, None] + offs_d[None, :], round_to(out, OUT.dtype.element_ty), mask=inside)
