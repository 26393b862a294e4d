"""Cosine form: φ of `dot` divided by the norm of the pooled patch, and W, from attention and Gram matrix."""

import triton
import triton.language as tl

from .shared import INTERPRETED, LOG2E, round_to, scalar, sum_pair, sum_three
from .tables import attention_column, image_tile, row_pitch, square


@triton.jit
def _products(
    rows_n, rows_m, n_live, m_live, D, stride_pd,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, DIAGONAL: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return products of patches `[BLOCK_N, BLOCK_N]`; `rows_n` and `rows_m` `[BLOCK_N, 1]` point at the patches."""
    acc = tl.zeros([BLOCK_N, BLOCK_N], tl.float32)
    for d in range(0, D, BLOCK_D):
        offs_d = (d + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]
        n_mask, m_mask = n_live[:, None], m_live[:, None]
        if not EVEN_D:
            n_mask &= offs_d < D
            m_mask &= offs_d < D
        right = tl.load(rows_m + offs_d * stride_pd, mask=m_mask, other=0.0)
        if INTERPRETED:
            right = right.to(tl.float32)
        if DIAGONAL:
            left = right
        else:
            left = tl.load(rows_n + offs_d * stride_pd, mask=n_mask, other=0.0).to(right.dtype)
        acc = tl.dot(left, right.T, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=("image_begin", "N"))
def gram_kernel(
    P, MASK, INV_P, GRAM, image_begin, N, D, stride_pb, stride_pn, stride_pd, stride_mb, stride_mn, stride_gram,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, HAS_MASK: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
    STARTS=None, ITEMS=None, SQUARES=None,
):  # fmt: skip
    """Write GRAM `[images, N, stride_gram]`, the cosines between the patches of each image.

    Masked patches and columns past N are 0. Only tiles on and above the diagonal are computed.
    """
    if STARTS is None:
        tiles = tl.cdiv(N, BLOCK_N)
        image = tl.program_id(0) // (tiles * tiles)
        tile = tl.program_id(0) % (tiles * tiles)
    else:
        image, tile, N, row, block_row = image_tile(ITEMS, STARTS, image_begin)
        tiles = tl.cdiv(N, BLOCK_N)
        stride_gram = row_pitch(N)
    tile_n, tile_m = tile // tiles, tile % tiles
    if tile_n > tile_m:
        return
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tile_m * BLOCK_N + tl.arange(0, BLOCK_N)
    n_live, m_live = n < N, m < N
    if HAS_MASK:
        if STARTS is None:
            mask = MASK + (image_begin + image).to(tl.int64) * stride_mb
        else:
            mask = MASK + row.to(tl.int64) * stride_mn
        n_live &= tl.load(mask + n * stride_mn, mask=n_live, other=0) != 0
        m_live &= tl.load(mask + m * stride_mn, mask=m_live, other=0) != 0
    if STARTS is None:
        base = P + (image_begin + image).to(tl.int64) * stride_pb
    else:
        base = P + row.to(tl.int64) * stride_pn
    rows_n = base + (n.to(tl.int64) * stride_pn)[:, None]
    rows_m = base + (m.to(tl.int64) * stride_pn)[:, None]
    if tile_n == tile_m:
        acc = _products(rows_n, rows_m, n_live, m_live, D, stride_pd, BLOCK_N, BLOCK_D, True, EVEN_D, PRECISION)
    else:
        acc = _products(rows_n, rows_m, n_live, m_live, D, stride_pd, BLOCK_N, BLOCK_D, False, EVEN_D, PRECISION)
    inv = INV_P + (image_begin + image) * N if STARTS is None else INV_P + row
    acc *= tl.load(inv + n, mask=n_live, other=0.0)[:, None] * tl.load(inv + m, mask=m_live, other=0.0)[None, :]
    acc = acc.to(GRAM.dtype.element_ty)
    if STARTS is None:
        gram = GRAM + image.to(tl.int64) * N * stride_gram
    else:
        gram = GRAM + square(SQUARES, image, image_begin)
    tl.store(gram + ((n * stride_gram)[:, None] + m[None, :]), acc, mask=(n < N)[:, None] & (m < stride_gram)[None, :])
    if tile_n != tile_m:
        tl.store(gram + ((m * stride_gram)[:, None] + n[None, :]), acc.T, mask=(m < N)[:, None])


@triton.jit
def _gram_attention(
    A, GRAM, a_rows, t_live, m0, N, width, stride_gram,
    BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return q = G a `[BLOCK_T, BLOCK_M]` for the patches from `m0` on; A and GRAM point at the image.

    Rows are read up to `width`, so that vectors are whole; past column N they hold zeros.
    """
    m = m0 + tl.arange(0, BLOCK_M)
    q = tl.zeros([BLOCK_T, BLOCK_M], tl.float32)
    for n0 in range(0, N, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        left = tl.load(A + a_rows[:, None] + n[None, :], mask=t_live[:, None] & (n < width)[None, :], other=0.0)
        right = tl.load(
            GRAM + n[:, None] * stride_gram + m[None, :], mask=(n < N)[:, None] & (m < width)[None, :], other=0.0
        )
        if INTERPRETED:
            left, right = left.to(tl.float32), right.to(tl.float32)
        q = tl.dot(left, right, q, input_precision=PRECISION)
    return q


@triton.jit
def _columns(q, A, a_rows, t_live, m0, width, PART: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return at most 64 columns of q, the same columns of a, and the indices of their patches.

    The intermediate values of a whole tile do not fit into registers.
    """
    PARTS: tl.constexpr = (BLOCK_M + 63) // 64
    if PARTS > 1:
        left, right = tl.split(tl.permute(tl.reshape(q, [BLOCK_T, 2, BLOCK_M // 2]), [0, 2, 1]))
        q = left if PART < PARTS // 2 else right
    if PARTS > 2:
        first, second = tl.split(tl.permute(tl.reshape(q, [BLOCK_T, 2, BLOCK_M // 4]), [0, 2, 1]))
        q = first if PART % 2 == 0 else second
    m = m0 + PART * (BLOCK_M // PARTS) + tl.arange(0, BLOCK_M // PARTS)
    a = tl.load(A + (a_rows[:, None] + m[None, :]), mask=t_live[:, None] & (m < width)[None, :], other=0.0)
    return q, a.to(tl.float32), m


@triton.jit(do_not_specialize=("image_begin", "N", "K", "stride_image", "stride_text", "stride_phi"))
def cosine_forward_from_attention_kernel(
    A, GRAM, TAU, PHI, STATE, image_begin, N, K, stride_image, stride_text, stride_gram, stride_phi, floor,
    BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, A_ALIGN: tl.constexpr,
    TAU_IS_TENSOR: tl.constexpr, PRECISION: tl.constexpr, STARTS=None, ITEMS=None, SQUARES=None,
):  # fmt: skip
    """Overwrite φ of `dot` with that of the cosine form, φ / max(r, floor) with r² = aᵀ G a.

    The log-sum-exp in bits replaces the entropy in STATE, because the backward no longer has φ of `dot`. Each program
    takes one image and one tile of texts.
    """
    # The divisions tell the compiler how rows of A are aligned.
    stride_image = stride_image // A_ALIGN * A_ALIGN
    stride_text = stride_text // A_ALIGN * A_ALIGN
    if STARTS is not None:
        image, tile, N, row, block_row = image_tile(ITEMS, STARTS, image_begin)
        stride_text = row_pitch(N)
        stride_gram = row_pitch(N)
    width = tl.cdiv(N, A_ALIGN) * A_ALIGN
    tau = scalar(TAU, TAU_IS_TENSOR)
    scale = LOG2E / tau
    text_tiles = tl.cdiv(K, BLOCK_T)
    if STARTS is None:
        image = tl.program_id(0) // text_tiles
        text0 = tl.program_id(0) % text_tiles * BLOCK_T
    else:
        text0 = tile * BLOCK_T
    texts = text0 + tl.arange(0, BLOCK_T)
    t_live = texts < K
    if STARTS is None:
        a_image = A + image.to(tl.int64) * stride_image + text0 * stride_text
    else:
        a_image = A + attention_column(image, block_row) * K + text0.to(tl.int64) * stride_text
    a_rows = tl.arange(0, BLOCK_T) * stride_text
    if STARTS is None:
        gram = GRAM + image.to(tl.int64) * N * stride_gram
    else:
        gram = GRAM + square(SQUARES, image, image_begin)
    squared = tl.zeros([BLOCK_T], tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    for m0 in range(0, N, BLOCK_M):
        whole = _gram_attention(
            a_image, gram, a_rows, t_live, m0, N, width, stride_gram, BLOCK_T, BLOCK_M, BLOCK_N, PRECISION
        )
        for part in tl.static_range((BLOCK_M + 63) // 64):
            q, a, _ = _columns(whole, a_image, a_rows, t_live, m0, width, part, BLOCK_T, BLOCK_M)
            a_q, a_sum = sum_pair(q * a, a, 1)
            squared += a_q
            total += a_sum
    at = (image_begin + image).to(tl.int64) * stride_phi + texts
    phi = tl.load(PHI + at, mask=t_live, other=0.0)
    entropy = tl.load(STATE + at, mask=t_live, other=0.0)
    # The rounded attention does not sum to 1; NaN stays NaN.
    radius = tl.sqrt(tl.where(squared < 0.0, 0.0, squared)) / tl.where(total == 0.0, 1.0, total)
    radius = tl.where(radius < floor, floor, radius)
    tl.store(PHI + at, phi / radius, mask=t_live)
    tl.store(STATE + at, entropy + phi * scale, mask=t_live)


@triton.jit
def _bits(a, anchor):
    """Return log2(a) + anchor, which is `s scale` up to a constant per pair; any finite number will do where a is 0."""
    return tl.log2(tl.where(a > 0.0, a, 1.0)) + anchor[:, None]


@triton.jit
def _moments(
    whole, A, a_rows, t_live, m0, width, anchor, squared, weighted, total,
    BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Add Σ a q, Σ a bits and Σ a of the patches from `m0` on."""
    for part in tl.static_range((BLOCK_M + 63) // 64):
        q, a, _ = _columns(whole, A, a_rows, t_live, m0, width, part, BLOCK_T, BLOCK_M)
        a_q, a_bits, a_sum = sum_three(q * a, a * _bits(a, anchor), a, 1)
        squared += a_q
        weighted += a_bits
        total += a_sum
    return squared, weighted, total


@triton.jit
def _store_weights(
    whole, A, a_rows, t_live, m0, width, slope, mean_q, anchor, mean_bits, g, inv_t, inv_p, w, stride_w, N,
    BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, NEEDS_TAU: tl.constexpr,
):  # fmt: skip
    """Store W of the patches from `m0` on, and return their part of TAU_SUMS; A, `inv_p` and `w` point at the image."""
    tau_sum = 0.0
    w_rows = tl.arange(0, BLOCK_T) * stride_w
    for part in tl.static_range((BLOCK_M + 63) // 64):
        q, a, m = _columns(whole, A, a_rows, t_live, m0, width, part, BLOCK_T, BLOCK_M)
        above = (_bits(a, anchor) - mean_bits[:, None]) / LOG2E  # (s - u) / τ
        centred = above - slope[:, None] * (q - mean_q[:, None])
        ds = a * g[:, None]
        if NEEDS_TAU:
            tau_sum += tl.sum(tl.sum(ds * centred * above, 1), 0)
        weights = ds * (1.0 + centred) * inv_t[:, None] * tl.load(inv_p + m, mask=m < N, other=0.0)[None, :]
        at = w_rows[:, None] + m[None, :]
        tl.store(w + at, round_to(weights, w.dtype.element_ty), mask=t_live[:, None] & (m < N)[None, :])
    return tau_sum


@triton.jit(do_not_specialize=("image_begin", "N", "K", "stride_image", "stride_text", "stride_phi", "stride_inv_t"))
def cosine_weights_from_attention_kernel(
    A, GRAM, TAU, INV_P, INV_T, STATE, G, RANGE_SCALE, W, NORM_FACTOR, TAU_SUMS,
    image_begin, N, K, stride_image, stride_text, stride_w, stride_gram, stride_phi, stride_inv_t, floor,
    BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, A_ALIGN: tl.constexpr, N_ALIGN: tl.constexpr,
    WHOLE: tl.constexpr, TAU_IS_TENSOR: tl.constexpr, NEEDS_TAU: tl.constexpr, SCALED: tl.constexpr,
    PRECISION: tl.constexpr, STARTS=None, ITEMS=None, SQUARES=None,
):  # fmt: skip
    """Write W `[K, rows]` of the cosine form, and NORM_FACTOR `[images, K]`, from the attention A.

    A is `[images, K, stride_text]`. With `stride_inv_t` of 0 all images have the same texts. NORM_FACTOR = g u / r³ is
    the factor of each a aᵀ in the norm term (`norm_term_kernel`). dS = g (a / r) (1 + (s - u) / τ - (u / r² τ) (q -
    r²)); where r is at its floor, it is a constant and the last term is 0. The means u of s and r² of q are recomputed
    over the rounded A, and s is derived from A: (s - u) / τ is log2(a) minus its mean, times ln 2. Rounding errors that
    must cancel then do so for every τ. WHOLE: a tile holds all patches, and q = G a stays in registers; otherwise q is
    computed twice. TAU_SUMS gets each program's part of the temperature's gradient, negated.
    """
    # The divisions tell the compiler how rows of A and W are aligned.
    stride_image = stride_image // A_ALIGN * A_ALIGN
    stride_text = stride_text // A_ALIGN * A_ALIGN
    if STARTS is not None:
        image, tile, N, row, block_row = image_tile(ITEMS, STARTS, image_begin)
        stride_text = row_pitch(N)
        stride_gram = row_pitch(N)
    width = tl.cdiv(N, A_ALIGN) * A_ALIGN
    N = N // N_ALIGN * N_ALIGN
    tau = scalar(TAU, TAU_IS_TENSOR)
    scale = LOG2E / tau
    range_scale = tl.load(RANGE_SCALE) if SCALED else 1.0
    text_tiles = tl.cdiv(K, BLOCK_T)
    if STARTS is None:
        image = tl.program_id(0) // text_tiles
        text0 = tl.program_id(0) % text_tiles * BLOCK_T
    else:
        text0 = tile * BLOCK_T
    texts = text0 + tl.arange(0, BLOCK_T)
    t_live = texts < K
    if STARTS is None:
        a_image = A + image.to(tl.int64) * stride_image + text0 * stride_text
    else:
        a_image = A + attention_column(image, block_row) * K + text0.to(tl.int64) * stride_text
    a_rows = tl.arange(0, BLOCK_T) * stride_text
    if STARTS is None:
        gram = GRAM + image.to(tl.int64) * N * stride_gram
    else:
        gram = GRAM + square(SQUARES, image, image_begin)
    at = (image_begin + image).to(tl.int64) * stride_phi + texts
    state = tl.load(STATE + at, mask=t_live, other=0.0)
    # A small log-sum-exp is added before the mean is taken: then u, a small difference of the two, is exact.
    anchor = tl.where(tl.abs(state) < 32.0, state, 0.0)
    squared = tl.zeros([BLOCK_T], tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    weighted = tl.zeros([BLOCK_T], tl.float32)
    if WHOLE:
        q = _gram_attention(
            a_image, gram, a_rows, t_live, 0, N, width, stride_gram, BLOCK_T, BLOCK_M, BLOCK_N, PRECISION
        )
        squared, weighted, total = _moments(
            q, a_image, a_rows, t_live, 0, width, anchor, squared, weighted, total, BLOCK_T, BLOCK_M
        )
    else:
        for m0 in range(0, N, BLOCK_M):
            q = _gram_attention(
                a_image, gram, a_rows, t_live, m0, N, width, stride_gram, BLOCK_T, BLOCK_M, BLOCK_N, PRECISION
            )
            squared, weighted, total = _moments(
                q, a_image, a_rows, t_live, m0, width, anchor, squared, weighted, total, BLOCK_T, BLOCK_M
            )
    share = 1.0 / tl.where(total == 0.0, 1.0, total)
    radius = tl.sqrt(tl.where(squared < 0.0, 0.0, squared)) * share
    moves = radius > floor
    radius = tl.where(radius < floor, floor, radius)
    mean_q, mean_bits = squared * share, weighted * share
    u = (mean_bits + (state - anchor)) / scale
    slope = tl.where(moves, u / (radius * radius) * share / tau, 0.0)  # factor of q, which is not divided by Σ a
    g = tl.load(G + at, mask=t_live, other=0.0) / radius
    norm_factor = tl.where(moves, g * u / (radius * radius), 0.0) * share * share
    tl.store(NORM_FACTOR + image * K + texts, norm_factor * range_scale, mask=t_live)
    g *= share
    inv_t = tl.load(INV_T + image * stride_inv_t + texts, mask=t_live, other=0.0) * range_scale
    if STARTS is None:
        inv_p = INV_P + (image_begin + image) * N
        w = W + text0.to(tl.int64) * stride_w + image * N
    else:
        inv_p = INV_P + row
        w = W + text0.to(tl.int64) * stride_w + block_row
    if WHOLE:
        tau_sum = _store_weights(
            q, a_image, a_rows, t_live, 0, width, slope, mean_q, anchor, mean_bits, g, inv_t, inv_p, w, stride_w, N,
            BLOCK_T, BLOCK_M, NEEDS_TAU,
        )  # fmt: skip
    else:
        tau_sum = 0.0
        for m0 in range(0, N, BLOCK_M):
            q = _gram_attention(
                a_image, gram, a_rows, t_live, m0, N, width, stride_gram, BLOCK_T, BLOCK_M, BLOCK_N, PRECISION
            )
            tau_sum += _store_weights(
                q, a_image, a_rows, t_live, m0, width, slope, mean_q, anchor, mean_bits, g, inv_t, inv_p, w, stride_w,
                N, BLOCK_T, BLOCK_M, NEEDS_TAU,
            )  # fmt: skip
    if NEEDS_TAU:
        tl.store(TAU_SUMS + tl.program_id(0), tau_sum)
