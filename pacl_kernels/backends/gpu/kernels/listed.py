"""Pairs of images and listed texts: φ, attention and W from scores in memory, and sums over the pairs of a text."""

import triton
import triton.language as tl

from .attention import attention_of
from .largest import add_largest, max_result
from .shared import LOG2E, fma, round_to, scalar
from .softmax import add_softmax, softmax_result


@triton.jit
def _cosines(
    S, MASK, INV_P, inv_t, rows, live, image, n0, N, stride_mb, stride_mn, BLOCK_N: tl.constexpr, HAS_MASK: tl.constexpr
):
    """Return cosines of the pairs whose raw products are at S + `rows` with the patches from `n0` on.

    The other results are 1 / ‖p‖, the indices of the patches, and True for those that exist and are not masked.
    """
    n = n0 + tl.arange(0, BLOCK_N)
    inside = n < N
    if HAS_MASK:
        at = MASK + image.to(tl.int64) * stride_mb + n.to(tl.int64) * stride_mn
        inside &= tl.load(at, mask=inside, other=0) != 0
    inv_p = tl.load(INV_P + image * N + n, mask=inside, other=0.0)[None, :]
    known = live[:, None] & inside[None, :]
    s = tl.load(S + rows[:, None] + n[None, :], mask=known, other=0.0) * inv_p * inv_t
    return s, inv_p, n, inside


@triton.jit(do_not_specialize=("N", "M", "stride_image", "stride_text"))
def listed_forward_kernel(
    S, MASK, TAU, INV_P, INV_T, PHI, STATE, A, N, M, stride_mb, stride_mn, stride_image, stride_text,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, MAX: tl.constexpr,
    TAU_IS_TENSOR: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Write φ and STATE `[images, M]` of the `dot` form, or with MAX of the `max` form, from raw products S.

    S is `[images, M, N]`, and INV_T is `[images, M]`. A `[images, M, stride_text]`, unless None, gets the attention up
    to column N. A program has one image and BLOCK_T of its pairs. Compile without FMA contraction, see `attention_of`.
    """
    tau = scalar(TAU, TAU_IS_TENSOR)
    scale = LOG2E / tau
    tiles = tl.cdiv(M, BLOCK_T)
    image = tl.program_id(0) // tiles
    pairs = tl.program_id(0) % tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    live = pairs < M
    at = image.to(tl.int64) * M + pairs
    rows = at * N
    inv_t = tl.load(INV_T + at, mask=live, other=0.0)[:, None]
    EMPTY: tl.constexpr = -1.0 if MAX else 0.0  # `total` is Σ e, or the winner's index
    total = tl.zeros([BLOCK_T], tl.float32) + EMPTY
    weighted = tl.zeros([BLOCK_T], tl.float32)
    largest = tl.full([BLOCK_T], float("-inf"), tl.float32)
    for n0 in range(0, N, BLOCK_N):
        s, _, _, inside = _cosines(
            S, MASK, INV_P, inv_t, rows, live, image, n0, N, stride_mb, stride_mn, BLOCK_N, HAS_MASK
        )
        if MAX:
            largest, total = add_largest(s, n0, inside[None, :], largest, total, 1)
        else:
            total, weighted, largest = add_softmax(s, inside[None, :], scale, total, weighted, largest, True, True, 1)
    if MAX:
        phi, state = max_result(largest, total)
    else:
        phi, state = softmax_result(total, weighted, largest, scale, True)
    tl.store(PHI + at, phi, mask=live)
    tl.store(STATE + at, state, mask=live)
    if A is not None:
        base = A + image.to(tl.int64) * stride_image + pairs.to(tl.int64) * stride_text
        for n0 in range(0, N, BLOCK_N):
            s, _, n, inside = _cosines(
                S, MASK, INV_P, inv_t, rows, live, image, n0, N, stride_mb, stride_mn, BLOCK_N, HAS_MASK
            )
            a, _ = attention_of(s, PHI, phi[:, None], state[:, None], scale)
            a = tl.where(inside[None, :], a, 0.0)
            tl.store(base[:, None] + n[None, :], round_to(a, A.dtype.element_ty), mask=live[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=("N", "M", "stride_w"))
def listed_weights_kernel(
    S, MASK, TAU, INV_P, INV_T, PHI, STATE, G, RANGE_SCALE, W, TAU_SUMS, N, M, stride_mb, stride_mn, stride_w,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, TAU_IS_TENSOR: tl.constexpr, HAS_MASK: tl.constexpr,
    NEEDS_TAU: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Write W `[M, images N]` of the `dot` form, as `dot_weights_kernel` does, from raw products S `[images, M, N]`.

    PHI, STATE, G and INV_T are `[images, M]`. TAU_SUMS gets Σ a g (s - φ)² of each program, which has one image and
    BLOCK_T of its pairs. Compile without FMA contraction, see `attention_of`.
    """
    tau = scalar(TAU, TAU_IS_TENSOR)
    scale, inv_tau = LOG2E / tau, 1.0 / tau
    range_scale = tl.load(RANGE_SCALE) if SCALED else 1.0
    tiles = tl.cdiv(M, BLOCK_T)
    image = tl.program_id(0) // tiles
    pairs = tl.program_id(0) % tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    live = pairs < M
    at = image.to(tl.int64) * M + pairs
    inv_t = tl.load(INV_T + at, mask=live, other=0.0)[:, None]
    phi = tl.load(PHI + at, mask=live, other=0.0)[:, None]
    state = tl.load(STATE + at, mask=live, other=0.0)[:, None]
    g = tl.load(G + at, mask=live, other=0.0)[:, None]
    base = W + pairs.to(tl.int64) * stride_w + image * N
    tau_sum = 0.0
    for n0 in range(0, N, BLOCK_N):
        s, inv_p, n, inside = _cosines(
            S, MASK, INV_P, inv_t, at * N, live, image, n0, N, stride_mb, stride_mn, BLOCK_N, HAS_MASK
        )
        a, centred = attention_of(s, PHI, phi, state, scale)
        w = a * (g * fma(centred, inv_tau, 1.0)) * inv_t * inv_p
        if SCALED:
            w *= range_scale
        w = tl.where(inside[None, :], w, 0.0)
        tl.store(base[:, None] + n[None, :], round_to(w, W.dtype.element_ty), mask=live[:, None] & (n < N)[None, :])
        if NEEDS_TAU:
            part = tl.where(live[:, None] & inside[None, :], a * g * centred * centred, 0.0)
            tau_sum += tl.sum(tl.sum(part, 1), 0)
    if NEEDS_TAU:
        tl.store(TAU_SUMS + tl.program_id(0), tau_sum)


@triton.jit(do_not_specialize=("count",))
def sum_rows_kernel(
    X, PLACES, WEIGHTS, STARTS, OUT, count, D, stride_d,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Write OUT `[count, D]`, float32: the sum of the rows of X at the offsets PLACES that belong to each row of OUT.

    STARTS has the first place of each row, then the end. Each row of X is multiplied by its number in WEIGHTS, unless
    that is None. ADD: add to OUT. A program adds ROWS rows at once, each to a sum of its own until the end, so that
    the order of the additions depends on STARTS alone.
    """
    blocks = tl.cdiv(D, BLOCK_D)
    out = tl.program_id(0) // blocks
    d = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    d_live = d < D
    begin, end = tl.load(STARTS + out), tl.load(STARTS + out + 1)
    if ADD and begin == end:
        return
    sums = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for first in range(begin, end, ROWS):
        row = first + tl.arange(0, ROWS)
        live = row < end
        place = tl.load(PLACES + row, mask=live, other=0)
        at = place[:, None] + (d.to(tl.int64) * stride_d)[None, :]
        x = tl.load(X + at, mask=live[:, None] & d_live[None, :], other=0.0).to(tl.float32)
        if WEIGHTS is not None:
            x *= tl.load(WEIGHTS + row, mask=live, other=0.0)[:, None]
        sums += x
    total = tl.sum(sums, 0)
    to = OUT + out.to(tl.int64) * D + d
    if ADD:
        total += tl.load(to, mask=d_live, other=0.0)
    tl.store(to, total, mask=d_live)
