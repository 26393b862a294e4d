"""Gradient weights W of the `dot` form."""

import triton
import triton.language as tl

from .attention import attention_of, pair_values
from .scores import patch_columns, product
from .shared import LOG2E, fma, round_to, scalar


@triton.jit
def _weights_quarter(
    acc, col0, inv_t, text0, texts, t_live, row0, image_end, at_row,
    MASK, INV_P, PHI, STATE, G, W, range_scale, N, scale, inv_tau, stride_mb, stride_mn, stride_phi, stride_w,
    COLS: tl.constexpr, IMAGES: tl.constexpr,
    HAS_MASK: tl.constexpr, NEEDS_TAU: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Store the weights of the columns of a tile from `col0` on; return their part of TAU_SUMS."""
    cols = col0 + tl.arange(0, COLS)
    rows, _, p_live = patch_columns(MASK, 0, row0 + col0, image_end, N, 0, 0, stride_mb, stride_mn, COLS, 0, HAS_MASK)
    inv_p = tl.load(INV_P + rows, mask=p_live, other=0.0)[None, :]
    state, phi, g = pair_values(
        STATE, PHI, G, cols, rows, texts, t_live, p_live, row0, row0 + col0, image_end, N, stride_phi, IMAGES
    )
    inv_t = inv_t[:, None]
    s = acc * inv_p * inv_t
    a, centred = attention_of(s, PHI, phi, state, scale)
    w = a * (g * fma(centred, inv_tau, 1.0)) * inv_t * inv_p
    if SCALED:
        w *= range_scale
    if HAS_MASK:  # masked columns may hold anything, NaN included
        w = tl.where(p_live[None, :], w, 0.0)
    # One 64-bit address and small offsets: one address per element would take twice the registers.
    base = W + text0.to(tl.int64) * stride_w
    at_text = ((texts - text0) * stride_w)[:, None]
    tl.store(base + at_row + at_text + cols[None, :], round_to(w, W.dtype.element_ty))
    if NEEDS_TAU:
        part = tl.where(t_live[:, None] & p_live[None, :], a * g * centred * centred, 0.0)
        return tl.sum(tl.sum(part, 1), 0)
    else:
        return 0.0


@triton.jit
def _packed_weights_quarter(
    acc, col0, inv_t, text0, texts, t_live, row0, row_end, at_row, STARTS, ROW_IMAGE,
    MASK, INV_P, PHI, STATE, G, W, range_scale, scale, inv_tau, stride_mb, stride_phi, stride_w,
    COLS: tl.constexpr, HAS_MASK: tl.constexpr, NEEDS_TAU: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Do the same as `_weights_quarter` for packed images, one after the other."""
    row = row0 + col0
    rows, _, p_live = patch_columns(MASK, 0, row, row_end, 1, 0, 0, stride_mb, 0, COLS, 0, HAS_MASK)
    inv_p = tl.load(INV_P + rows, mask=p_live, other=0.0)[None, :]
    inv_t = inv_t[:, None]
    s = acc * inv_p * inv_t
    base = W + text0.to(tl.int64) * stride_w + at_row
    at = ((texts - text0) * stride_w)[:, None] + (col0 + tl.arange(0, COLS))[None, :]
    tau_sum = 0.0
    if row < row_end:
        first = tl.load(ROW_IMAGE + row)
        last = tl.load(ROW_IMAGE + tl.minimum(row + COLS, row_end) - 1)
        for later in range(last - first + 1):
            image = first + later
            inside = (rows >= tl.load(STARTS + image)) & (rows < tl.load(STARTS + image + 1)) & (rows < row_end)
            at_pair = image.to(tl.int64) * stride_phi + texts
            state = tl.load(STATE + at_pair, mask=t_live, other=0.0)[:, None]
            phi = tl.load(PHI + at_pair, mask=t_live, other=0.0)[:, None]
            g = tl.load(G + at_pair, mask=t_live, other=0.0)[:, None]
            a, centred = attention_of(s, PHI, phi, state, scale)
            w = a * (g * fma(centred, inv_tau, 1.0)) * inv_t * inv_p
            if SCALED:
                w *= range_scale
            if HAS_MASK:  # masked columns may hold anything, NaN included
                w = tl.where(p_live[None, :], w, 0.0)
            tl.store(base + at, round_to(w, W.dtype.element_ty), mask=inside[None, :])
            if NEEDS_TAU:
                part = tl.where(t_live[:, None] & (inside & p_live)[None, :], a * g * centred * centred, 0.0)
                tau_sum += tl.sum(tl.sum(part, 1), 0)
    return tau_sum


@triton.jit(do_not_specialize=("image_begin", "image_end", "N", "K", "stride_phi"))
def dot_weights_kernel(
    P, T, MASK, TAU, INV_P, INV_T, PHI, STATE, G, RANGE_SCALE, W, TAU_SUMS,
    image_begin, image_end, N, K, D,
    stride_pb, stride_pn, stride_pd, stride_tk, stride_td, stride_mb, stride_mn, stride_phi, stride_w,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, IMAGES: tl.constexpr,
    TAU_IS_TENSOR: tl.constexpr, HAS_MASK: tl.constexpr, NEEDS_TAU: tl.constexpr, SCALED: tl.constexpr,
    DESCRIPTORS: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr, STARTS=None, ROW_IMAGE=None,
):  # fmt: skip
    """Write W `[K, rows]` = dS / (‖p‖ ‖t‖) of the `dot` form, dS = a g (1 + (s - φ) / τ), for a block of images.

    W has room for whole tiles; nothing past the last text or row is read later. The rows of PHI, STATE and G are
    `stride_phi` apart, so that a block of texts can be a slice. IMAGES: the most images that a quarter of a tile
    touches. TAU_SUMS gets Σ a g (s - φ)² of each item: -τ² times its part of the temperature's gradient.

    Packed images come as images of one patch, see `tables.py`; PHI, STATE and G then begin at the first image of all.

    Compile without FMA contraction, see `attention_of`.
    """
    tau = scalar(TAU, TAU_IS_TENSOR)
    scale, inv_tau = LOG2E / tau, 1.0 / tau
    range_scale = tl.load(RANGE_SCALE) if SCALED else 1.0
    text_tiles = tl.cdiv(K, BLOCK_T)
    items = text_tiles * tl.cdiv((image_end - image_begin) * N, BLOCK_P)
    QUARTER: tl.constexpr = BLOCK_P // 4
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        text0 = item % text_tiles * BLOCK_T
        at_row = item // text_tiles * BLOCK_P
        row0 = image_begin * N + at_row
        texts = text0 + tl.arange(0, BLOCK_T)
        t_live = texts < K
        t_offsets = texts.to(tl.int64) * stride_tk
        inv_t = tl.load(INV_T + texts, mask=t_live, other=0.0)
        rows, p_offsets, p_live = patch_columns(
            MASK, 0, row0, image_end, N, stride_pb, stride_pn, stride_mb, stride_mn, BLOCK_P, 0, HAS_MASK
        )
        acc = product(
            P, T, p_offsets, p_live, row0, t_offsets, t_live, text0, D, stride_pd, stride_td,
            BLOCK_T, BLOCK_P, BLOCK_D, DESCRIPTORS, EVEN_D, PRECISION,
        )  # fmt: skip
        # A quarter of the columns at a time, because the intermediate values of a whole tile do not fit into registers.
        left, right = tl.split(tl.permute(tl.reshape(acc, [BLOCK_T, 2, BLOCK_P // 2]), [0, 2, 1]))
        tau_sum = 0.0
        for half in tl.static_range(2):
            both = left if half == 0 else right
            first, second = tl.split(tl.permute(tl.reshape(both, [BLOCK_T, 2, QUARTER]), [0, 2, 1]))
            for quarter in tl.static_range(2):
                if STARTS is None:
                    tau_sum += _weights_quarter(
                        first if quarter == 0 else second, (2 * half + quarter) * QUARTER,
                        inv_t, text0, texts, t_live, row0, image_end, at_row,
                        MASK, INV_P, PHI, STATE, G, W, range_scale, N, scale, inv_tau,
                        stride_mb, stride_mn, stride_phi, stride_w,
                        QUARTER, IMAGES, HAS_MASK, NEEDS_TAU, SCALED,
                    )  # fmt: skip
                else:
                    tau_sum += _packed_weights_quarter(
                        first if quarter == 0 else second, (2 * half + quarter) * QUARTER,
                        inv_t, text0, texts, t_live, row0, image_end, at_row, STARTS, ROW_IMAGE,
                        MASK, INV_P, PHI, STATE, G, W, range_scale, scale, inv_tau, stride_mb, stride_phi, stride_w,
                        QUARTER, HAS_MASK, NEEDS_TAU, SCALED,
                    )  # fmt: skip
        if NEEDS_TAU:
            tl.store(TAU_SUMS + item, tau_sum)
