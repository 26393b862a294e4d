"""The weights of the `dot` form's gradients, or the attention of the cosine form."""

import triton
import triton.language as tl

from .scores import patch_columns, product
from .shared import LOG2E, fused, round_to, scalar


@triton.jit
def _of_two(X, at, stride, known, known_later, later, IMAGES: tl.constexpr):
    """X `[texts, 1]` of one image or, in the columns `later`, of the next."""
    x = tl.load(X + at, mask=known, other=0.0)[:, None]
    if IMAGES == 2:
        x = tl.where(later[None, :], tl.load(X + at + stride, mask=known_later, other=0.0)[:, None], x)
    return x


@triton.jit
def _weights_slice(
    acc, col0, inv_t, text0, texts, t_live, row0, image_begin, image_end, at_row,
    MASK, INV_P, PHI, STAT, G, W, w_scale, N, scale, inv_tau, stride_mb, stride_mn, stride_phi, stride_image, stride_w,
    COLS: tl.constexpr, IMAGES: tl.constexpr, ALIGN: tl.constexpr,
    ATTENTION: tl.constexpr, HAS_MASK: tl.constexpr, NEEDS_TAU: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Stores the weights (or attention) of a tile's columns from `col0` on; returns their part of TAU_SUMS."""
    cols = col0 + tl.arange(0, COLS)
    rows, _, p_live = patch_columns(MASK, 0, row0 + col0, image_end, N, 0, 0, stride_mb, stride_mn, COLS, 0, HAS_MASK)
    inv_p = tl.load(INV_P + rows, mask=p_live, other=0.0)[None, :]
    phi, g = 0.0, 0.0
    first = (row0 + col0) // N
    if IMAGES > 2:
        at = (rows // N).to(tl.int64)[None, :] * stride_phi + texts[:, None]
        known = t_live[:, None] & p_live[None, :]
        stat = tl.load(STAT + at, mask=known, other=0.0)
        if PHI is not None:
            phi = tl.load(PHI + at, mask=known, other=0.0)
        if not ATTENTION:
            g = tl.load(G + at, mask=known, other=0.0)
    else:
        at = first.to(tl.int64) * stride_phi + texts
        known = t_live & (first < image_end)
        later = cols >= (first + 1) * N - row0
        known_later = t_live & (first + 1 < image_end)
        stat = _of_two(STAT, at, stride_phi, known, known_later, later, IMAGES)
        if PHI is not None:
            phi = _of_two(PHI, at, stride_phi, known, known_later, later, IMAGES)
        if not ATTENTION:
            g = _of_two(G, at, stride_phi, known, known_later, later, IMAGES)
    inv_t = inv_t[:, None]
    s = acc * inv_p * inv_t
    if PHI is None:
        a = tl.exp2(s * scale - stat)
    else:
        centred = s - phi
        a = tl.exp2(fused(centred, scale, -stat))
    if ATTENTION:
        w = a
    else:
        w = a * (g * fused(centred, inv_tau, 1.0)) * inv_t * inv_p
    if SCALED:
        w *= w_scale
    if HAS_MASK or ATTENTION:  # columns behind the mask hold anything, NaN included
        w = tl.where(p_live[None, :], w, 0.0)
    # One 64-bit address and small offsets: an address for each element takes twice the registers.
    base = W + text0.to(tl.int64) * stride_w
    at_text = ((texts - text0) * stride_w)[:, None]
    if ATTENTION:
        # Images begin at columns that are multiples of ALIGN: within those, columns lie one after the other.
        gap = stride_image - N
        if IMAGES > 2:
            at = cols + (rows // N - first) * gap
        elif IMAGES == 2:
            at = cols + tl.where(later, gap, 0)
        else:
            at = cols
        at = tl.max_contiguous(tl.multiple_of(at, [ALIGN]), [ALIGN])
        live = t_live[:, None] & (cols < image_end * N - row0)[None, :]
        base += at_row + (first - image_begin) * gap
        tl.store(base + (at_text + at[None, :]), round_to(w, W.dtype.element_ty), mask=live)
    else:
        tl.store(base + at_row + at_text + cols[None, :], round_to(w, W.dtype.element_ty))
    if NEEDS_TAU:
        part = tl.where(t_live[:, None] & p_live[None, :], a * g * centred * centred, 0.0)
        return tl.sum(tl.sum(part, 1), 0)
    else:
        return 0.0


@triton.jit(do_not_specialize=("image_begin", "image_end", "N", "K", "stride_phi", "stride_image"))
def score_backward_kernel(
    P, T, MASK, TAU, INV_P, INV_T, PHI, STAT, G, W_SCALE, W, TAU_SUMS,
    image_begin, image_end, N, K, D,
    stride_pb, stride_pn, stride_pd, stride_tk, stride_td, stride_mb, stride_mn, stride_phi, stride_image, stride_w,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, IMAGES: tl.constexpr, ALIGN: tl.constexpr,
    ATTENTION: tl.constexpr, TAU_IS_TENSOR: tl.constexpr, HAS_MASK: tl.constexpr,
    NEEDS_TAU: tl.constexpr, SCALED: tl.constexpr,
    DESCRIPTORS: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """W `[K, rows]` = dS / (‖p‖ ‖t‖) of the `dot` form, dS = a g (1 + (s - φ) / τ), for a block of images. With
    ATTENTION, W `[images, K, stride_w]` = a for the cosine form; without PHI, STAT is the log-sum-exp.

    The weights have room for whole tiles; what lies past the last text or row is not read. PHI, STAT and G have rows
    `stride_phi` apart, so that a block of texts can be taken. IMAGES: how many a quarter of a tile touches at most.
    TAU_SUMS gets Σ a g (s - φ)² of each item: -τ² times its part of the temperature's gradient.

    To be compiled without fused multiply-adds: s is rounded before φ, or s / τ before the log-sum-exp, is taken from
    it, as when the forward made them. Where one patch has all the attention the difference is then exactly 0; fused, it
    would be a rounding error, which τ divides. `fused` stands where a product need not be rounded.
    """
    if ATTENTION:  # what the divisions tell the compiler: how rows are aligned, and where in a row images begin
        N = N // ALIGN * ALIGN
        stride_image = stride_image // ALIGN * ALIGN
        stride_w = stride_w // ALIGN * ALIGN
    tau = scalar(TAU, TAU_IS_TENSOR)
    scale, inv_tau = LOG2E / tau, 1.0 / tau
    w_scale = tl.load(W_SCALE) if SCALED else 1.0
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
        # A quarter of the columns at a time: the whole tile's intermediate values do not fit into registers.
        left, right = tl.split(tl.permute(tl.reshape(acc, [BLOCK_T, 2, BLOCK_P // 2]), [0, 2, 1]))
        tau_sum = 0.0
        for half in tl.static_range(2):
            both = left if half == 0 else right
            first, second = tl.split(tl.permute(tl.reshape(both, [BLOCK_T, 2, QUARTER]), [0, 2, 1]))
            for quarter in tl.static_range(2):
                tau_sum += _weights_slice(
                    first if quarter == 0 else second, (2 * half + quarter) * QUARTER,
                    inv_t, text0, texts, t_live, row0, image_begin, image_end, at_row,
                    MASK, INV_P, PHI, STAT, G, W, w_scale, N, scale, inv_tau,
                    stride_mb, stride_mn, stride_phi, stride_image, stride_w,
                    QUARTER, IMAGES, ALIGN, ATTENTION, HAS_MASK, NEEDS_TAU, SCALED,
                )  # fmt: skip
        if NEEDS_TAU:
            tl.store(TAU_SUMS + item, tau_sum)
