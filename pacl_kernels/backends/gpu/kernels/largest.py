"""The `max` form: first of the largest cosines, and gradients of the winners."""

import triton
import triton.language as tl

from .shared import INTERPRETED, round_to


@triton.jit
def add_largest(s, first_n, inside, best, index, AXIS: tl.constexpr):
    """Return the first maximum of `best` and the columns `inside`; `first_n`: patch of column 0. NaN counts as inf."""
    key = tl.where(inside, tl.where(s != s, float("inf"), s), float("-inf"))
    top, at = tl.max(key, AXIS, return_indices=True, return_indices_tie_break_left=True)
    higher = top > best
    return tl.where(higher, top, best), tl.where(higher, (first_n + at).to(tl.float32), index)


@triton.jit
def max_result(best, index):
    phi = tl.where(best == float("inf"), float("nan"), best)
    return tl.where(index < 0.0, 0.0, phi), index


@triton.jit(do_not_specialize=("B", "N", "K"))
def max_texts_kernel(
    P, INV_P, INV_T, INDEX, G, SUM, B, N, K, D, stride_pb, stride_pn, stride_pd,
    TEXTS: tl.constexpr, IMAGES: tl.constexpr, BLOCK_D: tl.constexpr, STARTS=None,
):  # fmt: skip
    """Write SUM `[K, D]` = Σ_b g p / (‖p‖ ‖t‖) over the patches that won.

    A program has TEXTS texts and loads the winners of IMAGES images at once; each of these has a sum of its own until
    the end.
    """
    d_blocks = tl.cdiv(D, BLOCK_D)
    row = tl.arange(0, IMAGES * TEXTS)
    text0 = tl.program_id(0) // d_blocks * TEXTS
    offs_d = tl.program_id(0) % d_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    d_live = (offs_d < D)[None, :]
    offsets_d = (offs_d.to(tl.int64) * stride_pd)[None, :]
    sums = tl.zeros([IMAGES * TEXTS, BLOCK_D], tl.float32)
    for first in range(0, B, IMAGES):
        image, text = first + row // TEXTS, text0 + row % TEXTS
        at = image.to(tl.int64) * K + text
        n = tl.load(INDEX + at, mask=(image < B) & (text < K), other=-1.0).to(tl.int32)
        won = n >= 0
        if STARTS is None:
            w = tl.load(G + at, mask=won, other=0.0) * tl.load(INV_P + image * N + n, mask=won, other=0.0)
            offsets = image.to(tl.int64) * stride_pb + n.to(tl.int64) * stride_pn
        else:
            patch = tl.load(STARTS + image, mask=won, other=0) + n
            w = tl.load(G + at, mask=won, other=0.0) * tl.load(INV_P + patch, mask=won, other=0.0)
            offsets = patch.to(tl.int64) * stride_pn
        p = tl.load(P + offsets[:, None] + offsets_d, mask=won[:, None] & d_live, other=0.0)
        sums += w[:, None] * p.to(tl.float32)
    text = text0 + tl.arange(0, TEXTS)
    t_live = text < K
    total = tl.sum(tl.reshape(sums, [IMAGES, TEXTS, BLOCK_D]), 0)
    total *= tl.load(INV_T + text, mask=t_live, other=0.0)[:, None]
    at = text.to(tl.int64)[:, None] * D + offs_d[None, :]
    tl.store(SUM + at, total, mask=t_live[:, None] & d_live)


@triton.jit(do_not_specialize=("image_begin", "N", "K"))
def max_patches_kernel(
    T, INV_P, INV_T, INDEX, G, RANGE_SCALE, RAW, image_begin, N, K, D, stride_tk, stride_td,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    SCALED: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr, STARTS=None, ROW_IMAGE=None,
):  # fmt: skip
    """Write RAW `[images, N, D]` = Σ_k g t / (‖p‖ ‖t‖) over the texts that each patch won.

    This is a product with the weights, which are 0 except at the winners. A 16-bit weight is two numbers, of which the
    second is the rounding error of the first: where patches and texts share a direction, the projection removes most
    of the sum and would leave that error. SCALED: weights are multiplied by RANGE_SCALE before rounding, against
    underflow. Packed images come as one image: `image_begin` is its first row, and N rows are those of the block.
    """
    d_tiles = tl.cdiv(D, BLOCK_D)
    tiles = tl.cdiv(N, BLOCK_N) * d_tiles
    image = image_begin + tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    n = tile // d_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tile % d_tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    n_live, d_live = n < N, offs_d < D
    range_scale = tl.load(RANGE_SCALE) if SCALED else 1.0
    if STARTS is None:
        index, g = INDEX + image.to(tl.int64) * K, G + image.to(tl.int64) * K
    else:
        of_row = tl.load(ROW_IMAGE + image_begin + n, mask=n_live, other=0)
        own = image_begin + n - tl.load(STARTS + of_row)
        at_image = of_row.to(tl.int64)[:, None] * K
    columns = T + (offs_d.to(tl.int64) * stride_td)[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        k_live = k < K
        t_live = k_live[:, None]
        if not EVEN_D:
            t_live &= d_live[None, :]
        t = tl.load(columns + (k.to(tl.int64) * stride_tk)[:, None], mask=t_live, other=0.0)
        if STARTS is None:
            w = tl.load(g + k, mask=k_live, other=0.0) * tl.load(INV_T + k, mask=k_live, other=0.0) * range_scale
            winner = tl.load(index + k, mask=k_live, other=-1.0).to(tl.int32)
            w = tl.where(winner[None, :] == n[:, None], w[None, :], 0.0)
        else:
            at = at_image + k[None, :]
            known = n_live[:, None] & k_live[None, :]
            won = tl.load(INDEX + at, mask=known, other=-1.0).to(tl.int32) == own[:, None]
            w = tl.load(G + at, mask=won & known, other=0.0)
            w *= (tl.load(INV_T + k, mask=k_live, other=0.0) * range_scale)[None, :]
        if T.dtype.element_ty == tl.float32:
            acc = tl.dot(w, t, acc, input_precision=PRECISION)
        else:
            high = round_to(w, T.dtype.element_ty)
            low = round_to(w - high.to(tl.float32), T.dtype.element_ty)
            if INTERPRETED:
                t, high, low = t.to(tl.float32), high.to(tl.float32), low.to(tl.float32)
            acc = tl.dot(high, t, acc)
            acc = tl.dot(low, t, acc)
    inv_p = INV_P + image * N if STARTS is None else INV_P + image_begin
    acc *= (tl.load(inv_p + n, mask=n_live, other=0.0) / range_scale)[:, None]
    at = RAW + ((image - image_begin).to(tl.int64) * N * D + (n * D)[:, None] + offs_d[None, :])
    tl.store(at, acc, mask=n_live[:, None] & d_live[None, :])
