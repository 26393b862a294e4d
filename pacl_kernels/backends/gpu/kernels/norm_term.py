"""Norm term of the cosine form: the part of the patches' gradient that comes from the norm of the pooled patch."""

import torch
import triton
import triton.language as tl

from .shared import INTERPRETED, round_to
from .tables import attention_column, image_tile, row_pitch, square

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}  # operands of `norm_term_kernel`


@triton.jit
def _weighted_gram(
    rows_n, rows_m, factors, n_live, m_live, K, stride_text,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, DIAGONAL: tl.constexpr, OPERANDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return Σ_k factor_k a_kn a_km `[BLOCK, BLOCK]`; `rows_n` and `rows_m` `[BLOCK_K, BLOCK]` point at text 0."""
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        right = tl.load(rows_m, mask=(k < K)[:, None] & m_live[None, :], other=0.0)
        if DIAGONAL:
            left = right.T
        else:
            left = tl.load(rows_n, mask=n_live[:, None] & (k < K)[None, :], other=0.0)
            rows_n += BLOCK_K * stride_text
        rows_m += BLOCK_K * stride_text
        factor = tl.load(factors + k, mask=k < K, other=0.0)
        left = left.to(tl.float32) * factor[None, :]  # may exceed the range of float16, hence bfloat16 operands
        if not INTERPRETED:
            left = left.to(OPERANDS)
        acc = tl.dot(left, right.to(left.dtype), acc, input_precision=PRECISION)
    return acc


@triton.jit
def _store_norm_term(c, acc, inv, n, m, N, stride_c, ADD: tl.constexpr):
    """Store -acc / ‖p_m‖ to rows `n` and columns `m` of an image's C, or add it if ADD."""
    c += (n * stride_c)[:, None] + m[None, :]
    live = (n < N)[:, None] & (m < stride_c)[None, :]
    acc *= -tl.load(inv + m, mask=m < N, other=0.0)[None, :]
    if ADD:
        acc += tl.load(c, mask=live, other=0.0)
    tl.store(c, round_to(acc, c.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=("image_begin", "N", "K", "stride_image", "stride_text", "stride_c"))
def norm_term_kernel(
    A, NORM_FACTOR, INV_P, C, image_begin, N, K, stride_image, stride_text, stride_c,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, A_ALIGN: tl.constexpr, C_ALIGN: tl.constexpr,
    ADD: tl.constexpr, OPERANDS: tl.constexpr, PRECISION: tl.constexpr, STARTS=None, ITEMS=None, SQUARES=None,
):  # fmt: skip
    """Write C `[images, N, stride_c]` = -Σ_k factor_k a_kn a_km / ‖p_m‖, or add it to C if ADD.

    C P / ‖p_n‖ is the part of ∂L/∂p_n that comes from r. C leaves out 1 / ‖p_n‖, with which it would underflow for
    large norms. The sum is symmetric, so only tiles on and above the diagonal are computed. Rows of A and C are read
    and written up to the next multiple of their alignment, so that vectors are whole; past column N, C is 0 where A is
    finite.
    """
    if STARTS is None:
        tiles = tl.cdiv(N, BLOCK)
        image = tl.program_id(0) // (tiles * tiles)
        tile = tl.program_id(0) % (tiles * tiles)
    else:
        image, tile, N, row, block_row = image_tile(ITEMS, STARTS, image_begin)
        tiles = tl.cdiv(N, BLOCK)
        stride_text = row_pitch(N)
        stride_c = row_pitch(N)
    tile_n, tile_m = tile // tiles, tile % tiles
    if tile_n > tile_m:
        return
    # The divisions tell the compiler how rows of A and C are aligned.
    stride_image = stride_image // A_ALIGN * A_ALIGN
    stride_text = stride_text // A_ALIGN * A_ALIGN
    stride_c = stride_c // C_ALIGN * C_ALIGN
    width = tl.cdiv(N, A_ALIGN) * A_ALIGN
    n = tile_n * BLOCK + tl.arange(0, BLOCK)
    m = tile_m * BLOCK + tl.arange(0, BLOCK)
    if STARTS is None:
        a = A + image.to(tl.int64) * stride_image
    else:
        a = A + attention_column(image, block_row) * K
    k = tl.arange(0, BLOCK_K) * stride_text
    rows_n, rows_m = a + n[:, None] + k[None, :], a + k[:, None] + m[None, :]
    factors = NORM_FACTOR + image * K
    if tile_n == tile_m:
        acc = _weighted_gram(
            rows_n, rows_m, factors, n < width, m < width, K, stride_text,
            BLOCK, BLOCK_K, True, OPERANDS, PRECISION,
        )  # fmt: skip
    else:
        acc = _weighted_gram(
            rows_n, rows_m, factors, n < width, m < width, K, stride_text,
            BLOCK, BLOCK_K, False, OPERANDS, PRECISION,
        )  # fmt: skip
    if STARTS is None:
        inv = INV_P + (image_begin + image) * N
        c = C + image.to(tl.int64) * N * stride_c
    else:
        inv = INV_P + row
        c = C + square(SQUARES, image, image_begin)
    _store_norm_term(c, acc, inv, n, m, N, stride_c, ADD)
    if tile_n != tile_m:
        _store_norm_term(c, acc.T, inv, m, n, N, stride_c, ADD)


@triton.jit(do_not_specialize=("image_begin", "N", "stride_c"))
def norm_term_product_kernel(
    C, P, INV_P, MASK, RAW, image_begin, N, D, stride_c, stride_pb, stride_pn, stride_pd, stride_mb, stride_mn,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, C_ALIGN: tl.constexpr,
    HAS_MASK: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr, STARTS=None, ITEMS=None, SQUARES=None,
):  # fmt: skip
    """Add C P / ‖p‖ to RAW `[images, N, D]`, masked patches as zeros; C is from `norm_term_kernel`, in RAW's dtype."""
    stride_c = stride_c // C_ALIGN * C_ALIGN  # tells the compiler how rows are aligned
    if STARTS is not None:
        image, tile, N, row, block_row = image_tile(ITEMS, STARTS, image_begin)
        stride_c = row_pitch(N)
    width = tl.cdiv(N, C_ALIGN) * C_ALIGN
    d_tiles = tl.cdiv(D, BLOCK_D)
    if STARTS is None:
        tiles = tl.cdiv(N, BLOCK_N) * d_tiles
        image = tl.program_id(0) // tiles
        tile = tl.program_id(0) % tiles
    n = tile // d_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tile % d_tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    n_live, d_live = n < N, d < D
    if STARTS is None:
        c = C + image.to(tl.int64) * N * stride_c + (n * stride_c)[:, None]
        p = P + (image_begin + image).to(tl.int64) * stride_pb + (d.to(tl.int64) * stride_pd)[None, :]
        mask = MASK + (image_begin + image).to(tl.int64) * stride_mb if HAS_MASK else MASK
    else:
        c = C + square(SQUARES, image, image_begin) + (n * stride_c)[:, None]
        p = P + row.to(tl.int64) * stride_pn + (d.to(tl.int64) * stride_pd)[None, :]
        mask = MASK + row.to(tl.int64) * stride_mn if HAS_MASK else MASK
    acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for m0 in range(0, N, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        m_live = m < N
        left = tl.load(c + m[None, :], mask=n_live[:, None] & (m < width)[None, :], other=0.0)
        if HAS_MASK:
            m_live &= tl.load(mask + m * stride_mn, mask=m_live, other=0) != 0
        p_live = m_live[:, None]
        if not EVEN_D:
            p_live &= d_live[None, :]
        right = tl.load(p + (m.to(tl.int64) * stride_pn)[:, None], mask=p_live, other=0.0)
        if INTERPRETED:
            left, right = left.to(tl.float32), right.to(tl.float32)
        acc = tl.dot(left, right.to(left.dtype), acc, input_precision=PRECISION)
    if STARTS is None:
        acc *= tl.load(INV_P + (image_begin + image) * N + n, mask=n_live, other=0.0)[:, None]
        at = RAW + (image.to(tl.int64) * N * D + (n * D)[:, None] + d[None, :])
    else:
        acc *= tl.load(INV_P + row + n, mask=n_live, other=0.0)[:, None]
        at = RAW + (block_row.to(tl.int64) * D + (n * D)[:, None] + d[None, :])
    live = n_live[:, None]
    if not EVEN_D:
        live &= d_live[None, :]
    acc += tl.load(at, mask=live, other=0.0).to(tl.float32)
    tl.store(at, round_to(acc, RAW.dtype.element_ty), mask=live)
