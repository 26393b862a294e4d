"""The Triton kernels. `triton.py` launches them and explains their order; docs/triton.md draws the tiles.

A tile has texts as its rows and patches as its columns, so that sums over patches run along a thread's own registers.
Operands are raw; the two inverse norms enter behind the product. The patches of all images lie one after the other: a
tile may end in the middle of an image, and nothing is padded but the last tile of a run of images. Images of at most
64 patches are padded to a power of two instead (`PAD`), several to a tile.

    P [B, N, D]  T [K, D]  MASK [B, N]  PHI, STAT, G [B, K]  INV_P [B N]  INV_T [K]      sizes and strides in elements

`do_not_specialize` names what depends on B, N or K, numbers and the addresses of slices: Triton would compile again
where one is a multiple of 16 and was not before, and the last batch of an epoch would wait for that.

STAT is what the backward needs beside φ: for `dot` the entropy of the attention in bits, lse(s / τ) - φ / τ over ln 2.
Unlike the log-sum-exp it is small where τ is, so `a = exp2((s - φ) log2(e) / τ - STAT)` loses nothing. For `cosine`
the log-sum-exp in bits, for `max` the index of the winning patch.
"""

import torch
import triton
import triton.language as tl

from .triton import interpreted

LOG2E = tl.constexpr(1.4426950408889634)
PLAIN_TEMPERATURE = tl.constexpr(0.05)  # from here on exp(s / τ) <= e^20 needs no running maximum, since |s| <= 1
MIN_NORM_SQUARED = tl.constexpr(1e-24)
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}
INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def _scalar(X, IS_TENSOR: tl.constexpr):
    """A number, or what is at that address; 0 for None."""
    if X is None:
        return 0.0
    elif IS_TENSOR:
        return tl.load(X).to(tl.float32)
    else:
        return X


@triton.jit
def _product(
    P, T, p_offsets, p_live, row0, t_offsets, t_live, text0, D, stride_pd, stride_td,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Raw products `[BLOCK_T, BLOCK_P]` of the texts from `text0` on and the patches from row `row0` on."""
    acc = tl.zeros([BLOCK_T, BLOCK_P], tl.float32)
    for d in range(0, D, BLOCK_D):
        if DESCRIPTORS:
            t = T.load([text0, d])
            p = P.load([row0, d])
        else:
            offs_d = d + tl.arange(0, BLOCK_D)
            t_mask, p_mask = t_live[:, None], p_live[:, None]
            if not EVEN_D:
                t_mask &= offs_d[None, :] < D
                p_mask &= offs_d[None, :] < D
            t = tl.load(T + t_offsets[:, None] + (offs_d * stride_td)[None, :], mask=t_mask, other=0.0)
            p = tl.load(P + p_offsets[:, None] + (offs_d * stride_pd)[None, :], mask=p_mask, other=0.0)
        if INTERPRETED:  # its tl.dot takes the bits of a bfloat16 for an integer
            t, p = t.to(tl.float32), p.to(tl.float32)
        acc = tl.dot(t, p.T, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _patch_columns(
    MASK, image0, row0, image_end, N, stride_pb, stride_pn, stride_mb, stride_mn,
    BLOCK_P: tl.constexpr, PAD: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Of each column of a tile: its row in `[B N]`, the offset of its patch, and whether it is one (and not masked)."""
    cols = tl.arange(0, BLOCK_P)
    if PAD > 0:
        image, n = image0 + cols // PAD, cols % PAD
        rows = image * N + n
        live = (n < N) & (image < image_end)
    else:
        rows = row0 + cols
        image = rows // N
        n = rows - image * N
        live = image < image_end
    offsets = image.to(tl.int64) * stride_pb + n.to(tl.int64) * stride_pn
    if HAS_MASK:
        at = MASK + image.to(tl.int64) * stride_mb + n.to(tl.int64) * stride_mn
        live &= tl.load(at, mask=live, other=0) != 0
    return rows, offsets, live


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def _sum_pair(a, b, AXIS: tl.constexpr):
    """Both sums in one pass, so that neither operand is ever whole in registers."""
    if INTERPRETED:  # a reduction with its own function is a loop over elements there
        return tl.sum(a, AXIS), tl.sum(b, AXIS)
    else:
        return tl.reduce((a, b), AXIS, _add_pairs)


@triton.jit
def _add_threes(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def _sum_three(a, b, c, AXIS: tl.constexpr):
    if INTERPRETED:
        return tl.sum(a, AXIS), tl.sum(b, AXIS), tl.sum(c, AXIS)
    else:
        return tl.reduce((a, b, c), AXIS, _add_threes)


@triton.jit
def _add_softmax(
    s, inside, scale, total, weighted, largest,
    SELECT: tl.constexpr, SAFE: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """Adds the columns `inside` of a tile of cosines to Σ e, Σ e s and, if SAFE, the running maximum of s."""
    if SAFE:
        known = tl.where(inside, s, float("-inf")) if SELECT else s
        raised = tl.maximum(largest, tl.max(known, AXIS))
        anchor = tl.where(raised == float("-inf"), 0.0, raised)  # no patch so far: every e is 0
        shrink = tl.exp2((largest - anchor) * scale)
        e = tl.exp2((known - tl.expand_dims(anchor, AXIS)) * scale)
        total *= shrink
        weighted *= shrink
        largest = raised
    else:
        e = tl.exp2(s * scale)
    es = e * s
    if SELECT:  # NaN elsewhere must not come in: select, do not multiply
        e = tl.where(inside, e, 0.0)
        es = tl.where(inside, es, 0.0)
    e_sum, es_sum = _sum_pair(e, es, AXIS)
    return total + e_sum, weighted + es_sum, largest


@triton.jit
def _softmax_result(total, weighted, largest, scale, SAFE: tl.constexpr):
    """φ and the entropy in bits; 0 for an image without a patch."""
    empty = total == 0.0
    phi = tl.where(empty, 0.0, weighted / tl.where(empty, 1.0, total))
    offset = (tl.where(empty, 0.0, largest) - phi) * scale if SAFE else -phi * scale
    return phi, tl.where(empty, 0.0, tl.log2(tl.where(empty, 1.0, total)) + offset)


@triton.jit
def _add_largest(s, first_n, inside, best, index, AXIS: tl.constexpr):
    """The first maximum of `best` so far and the columns `inside`, whose first is patch `first_n`. NaN wins, as inf."""
    key = tl.where(inside, tl.where(s != s, float("inf"), s), float("-inf"))
    top, at = tl.max(key, AXIS, return_indices=True, return_indices_tie_break_left=True)
    higher = top > best
    return tl.where(higher, top, best), tl.where(higher, (first_n + at).to(tl.float32), index)


@triton.jit
def _max_result(best, index):
    phi = tl.where(best == float("inf"), float("nan"), best)
    return tl.where(index < 0.0, 0.0, phi), index


@triton.jit(do_not_specialize=("B", "N", "K", "images_per_run"))
def score_forward_kernel(
    P, T, MASK, TAU, INV_P, INV_T, PHI, STAT,
    B, N, K, D, stride_pb, stride_pn, stride_pd, stride_tk, stride_td, stride_mb, stride_mn, images_per_run,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, PAD: tl.constexpr, IMAGES: tl.constexpr,
    MAX: tl.constexpr, SAFE: tl.constexpr, TAU_IS_TENSOR: tl.constexpr, HAS_MASK: tl.constexpr,
    DESCRIPTORS: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """φ and STAT of the `dot` form, or with MAX of that one. Persistent: each program takes runs of images against one
    tile of texts.

    IMAGES: how many a tile touches at most. A temperature in device memory chooses between the launch that is SAFE (a
    running maximum) and the one that is not, without the host reading it: the other has no items.
    """
    tau = _scalar(TAU, TAU_IS_TENSOR)
    scale = LOG2E / tau
    text_tiles = tl.cdiv(K, BLOCK_T)
    items = text_tiles * tl.cdiv(B, images_per_run)
    if TAU_IS_TENSOR:
        items = tl.where((tau < PLAIN_TEMPERATURE) == SAFE, items, 0)
    cols = tl.arange(0, BLOCK_P)
    EMPTY: tl.constexpr = -1.0 if MAX else 0.0  # `total` is Σ e, or the winner's index
    # Texts change fastest: programs that run together then read the same patches.
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        text0 = item % text_tiles * BLOCK_T
        image_begin = item // text_tiles * images_per_run
        image_end = tl.minimum(image_begin + images_per_run, B)
        texts = text0 + tl.arange(0, BLOCK_T)
        t_live = texts < K
        t_offsets = texts.to(tl.int64) * stride_tk
        inv_t = tl.load(INV_T + texts, mask=t_live, other=0.0)
        total = tl.zeros([BLOCK_T], tl.float32) + EMPTY
        weighted = tl.zeros([BLOCK_T], tl.float32)
        largest = tl.full([BLOCK_T], float("-inf"), tl.float32)
        if PAD > 0:
            tiles = tl.cdiv(image_end - image_begin, IMAGES)
        else:
            tiles = tl.cdiv((image_end - image_begin) * N, BLOCK_P)
        for tile in range(tiles):
            row0 = image_begin * N + tile * BLOCK_P
            image0 = image_begin + tile * IMAGES if PAD > 0 else row0 // N
            rows, p_offsets, p_live = _patch_columns(
                MASK, image0, row0, image_end, N, stride_pb, stride_pn, stride_mb, stride_mn, BLOCK_P, PAD, HAS_MASK
            )
            acc = _product(
                P, T, p_offsets, p_live, row0, t_offsets, t_live, text0, D, stride_pd, stride_td,
                BLOCK_T, BLOCK_P, BLOCK_D, DESCRIPTORS, EVEN_D, PRECISION,
            )  # fmt: skip
            inv_p = tl.load(INV_P + rows, mask=p_live, other=0.0)
            s = acc * inv_t[:, None] * inv_p[None, :]
            if PAD > 0:
                one = tl.zeros([BLOCK_T, IMAGES], tl.float32)
                parts = tl.reshape(s, [BLOCK_T, IMAGES, PAD])
                inside = tl.reshape(p_live, [1, IMAGES, PAD])
                if MAX:
                    top, index = _add_largest(parts, 0, inside, one + float("-inf"), one - 1.0, 2)
                    phi, stat = _max_result(top, index)
                else:
                    e_sum, es_sum, top = _add_softmax(
                        parts, inside, scale, one, one, one + float("-inf"), True, SAFE, 2
                    )
                    phi, stat = _softmax_result(e_sum, es_sum, top, scale, SAFE)
                images = image0 + tl.arange(0, IMAGES)
                at = images.to(tl.int64)[None, :] * K + texts[:, None]
                stored = t_live[:, None] & (images < image_end)[None, :]
                tl.store(PHI + at, phi, mask=stored)
                tl.store(STAT + at, stat, mask=stored)
            else:
                for j in tl.static_range(IMAGES):
                    image = image0 + j
                    begin = image * N - row0
                    end = begin + N
                    if (begin < BLOCK_P) & (image < image_end):
                        inside = (p_live & (cols >= begin) & (cols < end))[None, :]
                        if MAX:
                            largest, total = _add_largest(s, -begin, inside, largest, total, 1)
                        elif HAS_MASK or (begin > 0) | (end < BLOCK_P):
                            total, weighted, largest = _add_softmax(
                                s, inside, scale, total, weighted, largest, True, SAFE, 1
                            )
                        else:
                            total, weighted, largest = _add_softmax(
                                s, True, scale, total, weighted, largest, False, SAFE, 1
                            )
                        if end <= BLOCK_P:
                            if MAX:
                                phi, stat = _max_result(largest, total)
                            else:
                                phi, stat = _softmax_result(total, weighted, largest, scale, SAFE)
                            at = image.to(tl.int64) * K + texts
                            tl.store(PHI + at, phi, mask=t_live)
                            tl.store(STAT + at, stat, mask=t_live)
                            total = tl.zeros([BLOCK_T], tl.float32) + EMPTY
                            weighted = tl.zeros([BLOCK_T], tl.float32)
                            largest = tl.full([BLOCK_T], float("-inf"), tl.float32)


@triton.jit
def _of_two(X, at, stride, known, known_later, later, IMAGES: tl.constexpr):
    """X `[texts, 1]` of one image or, in the columns `later`, of the next."""
    x = tl.load(X + at, mask=known, other=0.0)[:, None]
    if IMAGES == 2:
        x = tl.where(later, tl.load(X + at + stride, mask=known_later, other=0.0)[:, None], x)
    return x


@triton.jit
def _weights_slice(
    acc, col0, inv_t, text0, texts, t_live, row0, image_end, at_row,
    MASK, INV_P, PHI, STAT, G, W, w_scale, N, scale, inv_tau, stride_mb, stride_mn, stride_phi, stride_w,
    COLS: tl.constexpr, IMAGES: tl.constexpr,
    ATTENTION: tl.constexpr, HAS_MASK: tl.constexpr, NEEDS_TAU: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Stores the weights (or attention) of a tile's columns from `col0` on; returns their part of TAU_SUMS."""
    cols = col0 + tl.arange(0, COLS)
    rows, _, p_live = _patch_columns(MASK, 0, row0 + col0, image_end, N, 0, 0, stride_mb, stride_mn, COLS, 0, HAS_MASK)
    inv_p = tl.load(INV_P + rows, mask=p_live, other=0.0)[None, :]
    phi, stat, g = 0.0, 0.0, 0.0
    if IMAGES > 2:
        at = (rows // N).to(tl.int64)[None, :] * stride_phi + texts[:, None]
        known = t_live[:, None] & p_live[None, :]
        stat = tl.load(STAT + at, mask=known, other=0.0)
        if PHI is not None:
            phi = tl.load(PHI + at, mask=known, other=0.0)
        if not ATTENTION:
            g = tl.load(G + at, mask=known, other=0.0)
    else:
        image = (row0 + col0) // N
        at = image.to(tl.int64) * stride_phi + texts
        known = t_live & (image < image_end)
        later = (cols >= (image + 1) * N - row0)[None, :]
        known_later = t_live & (image + 1 < image_end)
        stat = _of_two(STAT, at, stride_phi, known, known_later, later, IMAGES)
        if PHI is not None:
            phi = _of_two(PHI, at, stride_phi, known, known_later, later, IMAGES)
        if not ATTENTION:
            g = _of_two(G, at, stride_phi, known, known_later, later, IMAGES)
    inv_t = inv_t[:, None]
    s = acc * inv_t * inv_p
    centred = s - phi
    a = tl.exp2(centred * scale - stat)
    if ATTENTION:
        w = a
    else:
        w = a * (g * (1.0 + centred * inv_tau)) * inv_t * inv_p
    if SCALED:
        w *= w_scale
    if HAS_MASK or ATTENTION:  # columns behind the mask hold anything, NaN included
        w = tl.where(p_live[None, :], w, 0.0)
    # One 64-bit address and small offsets: an address for each element takes twice the registers.
    base = W + text0.to(tl.int64) * stride_w + at_row
    tl.store(base + ((texts - text0) * stride_w)[:, None] + cols[None, :], w.to(W.dtype.element_ty))
    if NEEDS_TAU:
        part = tl.where(t_live[:, None] & p_live[None, :], a * g * centred * centred, 0.0)
        return tl.sum(tl.sum(part, 1), 0)
    else:
        return 0.0


@triton.jit(do_not_specialize=("image_begin", "image_end", "N", "K", "stride_phi"))
def score_backward_kernel(
    P, T, MASK, TAU, INV_P, INV_T, PHI, STAT, G, W_SCALE, W, TAU_SUMS,
    image_begin, image_end, N, K, D,
    stride_pb, stride_pn, stride_pd, stride_tk, stride_td, stride_mb, stride_mn, stride_phi, stride_w,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, IMAGES: tl.constexpr,
    ATTENTION: tl.constexpr, TAU_IS_TENSOR: tl.constexpr, HAS_MASK: tl.constexpr,
    NEEDS_TAU: tl.constexpr, SCALED: tl.constexpr,
    DESCRIPTORS: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """W `[K, rows]` = dS / (‖p‖ ‖t‖) of the `dot` form, dS = a g (1 + (s - φ) / τ), for a block of images. With
    ATTENTION, W = a for the cosine form; without PHI, STAT is the log-sum-exp.

    W has room for whole tiles; what lies past its last text or row is not read. PHI, STAT and G have rows `stride_phi`
    apart, so that a block of texts can be taken. IMAGES: how many a quarter of a tile touches at most. TAU_SUMS gets
    Σ a g (s - φ)² of each item: -τ² times its part of the temperature's gradient.
    """
    tau = _scalar(TAU, TAU_IS_TENSOR)
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
        rows, p_offsets, p_live = _patch_columns(
            MASK, 0, row0, image_end, N, stride_pb, stride_pn, stride_mb, stride_mn, BLOCK_P, 0, HAS_MASK
        )
        acc = _product(
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
                    inv_t, text0, texts, t_live, row0, image_end, at_row,
                    MASK, INV_P, PHI, STAT, G, W, w_scale, N, scale, inv_tau,
                    stride_mb, stride_mn, stride_phi, stride_w,
                    QUARTER, IMAGES, ATTENTION, HAS_MASK, NEEDS_TAU, SCALED,
                )  # fmt: skip
        if NEEDS_TAU:
            tl.store(TAU_SUMS + item, tau_sum)


@triton.jit(do_not_specialize=("image_begin", "N"))
def gram_kernel(
    P, MASK, INV_P, GRAM, image_begin, N, D, stride_pb, stride_pn, stride_pd, stride_mb, stride_mn, stride_gram,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """GRAM `[images, N, stride_gram]`: cosines between the patches of each image, 0 for masked ones."""
    tiles = tl.cdiv(N, BLOCK_N)
    image = tl.program_id(0) // (tiles * tiles)
    tile = tl.program_id(0) % (tiles * tiles)
    n = tile // tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tile % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    n_live, m_live = n < N, m < N
    if HAS_MASK:
        mask = MASK + (image_begin + image).to(tl.int64) * stride_mb
        n_live &= tl.load(mask + n * stride_mn, mask=n_live, other=0) != 0
        m_live &= tl.load(mask + m * stride_mn, mask=m_live, other=0) != 0
    base = P + (image_begin + image).to(tl.int64) * stride_pb
    acc = tl.zeros([BLOCK_N, BLOCK_N], tl.float32)
    for d in range(0, D, BLOCK_D):
        offs_d = (d + tl.arange(0, BLOCK_D)).to(tl.int64)
        d_live = (offs_d < D)[None, :]
        offs_d = (offs_d * stride_pd)[None, :]
        left = tl.load(base + n.to(tl.int64)[:, None] * stride_pn + offs_d, mask=n_live[:, None] & d_live, other=0.0)
        right = tl.load(base + m.to(tl.int64)[:, None] * stride_pn + offs_d, mask=m_live[:, None] & d_live, other=0.0)
        if INTERPRETED:
            left, right = left.to(tl.float32), right.to(tl.float32)
        acc = tl.dot(left, right.T, acc, input_precision=PRECISION)
    inv = INV_P + (image_begin + image) * N
    acc *= tl.load(inv + n, mask=n_live, other=0.0)[:, None] * tl.load(inv + m, mask=m_live, other=0.0)[None, :]
    at = (image.to(tl.int64) * N + n)[:, None] * stride_gram + m[None, :]
    tl.store(GRAM + at, acc.to(GRAM.dtype.element_ty), mask=(n < N)[:, None] & (m < stride_gram)[None, :])


@triton.jit
def _pool(
    A, GRAM, a_rows, t_live, m0, N, stride_gram,
    BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q = G a and a `[BLOCK_T, BLOCK_M]` of the patches from `m0` on, of the image at whose first patch A points."""
    m = m0 + tl.arange(0, BLOCK_M)
    q = tl.zeros([BLOCK_T, BLOCK_M], tl.float32)
    for n0 in range(0, N, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        left = tl.load(A + a_rows[:, None] + n[None, :], mask=t_live[:, None] & (n < N)[None, :], other=0.0)
        right = tl.load(
            GRAM + n[:, None] * stride_gram + m[None, :], mask=(n < N)[:, None] & (m < N)[None, :], other=0.0
        )
        if INTERPRETED:
            left, right = left.to(tl.float32), right.to(tl.float32)
        q = tl.dot(left, right, q, input_precision=PRECISION)
    a = tl.load(A + a_rows[:, None] + m[None, :], mask=t_live[:, None] & (m < N)[None, :], other=0.0)
    return q, a.to(tl.float32)


@triton.jit(do_not_specialize=("image_begin", "N", "K", "stride_phi"))
def cosine_forward_kernel(
    A, GRAM, TAU, PHI, STAT, image_begin, N, K, stride_a, stride_gram, stride_phi, floor,
    BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, N_ALIGN: tl.constexpr,
    TAU_IS_TENSOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """φ of the cosine form over that of `dot`, φ / max(r, floor) with r² = aᵀ G a, and in STAT the log-sum-exp in bits
    over the entropy, since the backward has no `dot` φ any more. One program for an image and a tile of texts.
    """
    N = N // N_ALIGN * N_ALIGN  # tells the compiler how rows of A are aligned
    scale = LOG2E / _scalar(TAU, TAU_IS_TENSOR)
    text_tiles = tl.cdiv(K, BLOCK_T)
    image = tl.program_id(0) // text_tiles
    text0 = tl.program_id(0) % text_tiles * BLOCK_T
    texts = text0 + tl.arange(0, BLOCK_T)
    t_live = texts < K
    at_a = text0.to(tl.int64) * stride_a + image * N
    a_rows = tl.arange(0, BLOCK_T) * stride_a
    gram = GRAM + image.to(tl.int64) * N * stride_gram
    squared = tl.zeros([BLOCK_T], tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    for m0 in range(0, N, BLOCK_M):
        q, a = _pool(A + at_a, gram, a_rows, t_live, m0, N, stride_gram, BLOCK_T, BLOCK_M, BLOCK_N, PRECISION)
        part, a_part = _sum_pair(q * a, a, 1)
        squared += part
        total += a_part
    at = (image_begin + image).to(tl.int64) * stride_phi + texts
    phi = tl.load(PHI + at, mask=t_live, other=0.0)
    entropy = tl.load(STAT + at, mask=t_live, other=0.0)
    # The rounded attention does not sum to 1; NaN stays NaN.
    radius = tl.sqrt(tl.where(squared < 0.0, 0.0, squared)) / tl.where(total == 0.0, 1.0, total)
    radius = tl.where(radius < floor, floor, radius)
    tl.store(PHI + at, phi / radius, mask=t_live)
    tl.store(STAT + at, entropy + phi * scale, mask=t_live)


@triton.jit
def _scores_of(a, stat, scale):
    """s from `a = exp2(s scale - stat)`; where a is 0 any finite number will do."""
    return (tl.log2(tl.where(a > 0.0, a, 1.0)) + stat[:, None]) / scale


@triton.jit(do_not_specialize=("image_begin", "N", "K", "stride_phi"))
def cosine_backward_kernel(
    A, GRAM, TAU, INV_P, INV_T, STAT, G, W_SCALE, W, CURVATURE, TAU_SUMS,
    image_begin, N, K, stride_a, stride_gram, stride_phi, floor,
    BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, N_ALIGN: tl.constexpr,
    TAU_IS_TENSOR: tl.constexpr, NEEDS_TAU: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """W `[K, rows]` of the cosine form from the attention A, and CURVATURE `[images, K]` = g u / r³, what Σ a aᵀ is
    weighted with in the part that r adds to the patches' gradient.

    dS = g (a / r) (1 + (s - (u / r²) q) / τ); where r is at its floor it is a constant, and u takes the place of
    (u / r²) q. u, r and Σ a are summed again over the rounded A, so that what must cancel cancels.
    """
    N = N // N_ALIGN * N_ALIGN  # tells the compiler how rows of A are aligned
    tau = _scalar(TAU, TAU_IS_TENSOR)
    scale = LOG2E / tau
    w_scale = tl.load(W_SCALE) if SCALED else 1.0
    text_tiles = tl.cdiv(K, BLOCK_T)
    image = tl.program_id(0) // text_tiles
    text0 = tl.program_id(0) % text_tiles * BLOCK_T
    texts = text0 + tl.arange(0, BLOCK_T)
    t_live = texts < K
    at_a = text0.to(tl.int64) * stride_a + image * N
    a_rows = tl.arange(0, BLOCK_T) * stride_a
    gram = GRAM + image.to(tl.int64) * N * stride_gram
    at = (image_begin + image).to(tl.int64) * stride_phi + texts
    stat = tl.load(STAT + at, mask=t_live, other=0.0)
    squared = tl.zeros([BLOCK_T], tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    weighted = tl.zeros([BLOCK_T], tl.float32)
    for m0 in range(0, N, BLOCK_M):
        q, a = _pool(A + at_a, gram, a_rows, t_live, m0, N, stride_gram, BLOCK_T, BLOCK_M, BLOCK_N, PRECISION)
        part, as_part, a_part = _sum_three(q * a, a * _scores_of(a, stat, scale), a, 1)
        squared += part
        weighted += as_part
        total += a_part
    share = 1.0 / tl.where(total == 0.0, 1.0, total)
    radius = tl.sqrt(tl.where(squared < 0.0, 0.0, squared)) * share
    moves = radius > floor
    radius = tl.where(radius < floor, floor, radius)
    u = weighted * share
    slope = tl.where(moves, u / (radius * radius) * share, 0.0)  # of q, which is not divided by Σ a
    constant = tl.where(moves, 0.0, u)
    g = tl.load(G + at, mask=t_live, other=0.0) / radius
    curvature = tl.where(moves, g * u / (radius * radius), 0.0) * share * share
    tl.store(CURVATURE + image * K + texts, curvature * w_scale, mask=t_live)
    g *= share
    inv_t = tl.load(INV_T + texts, mask=t_live, other=0.0) * w_scale
    tau_sum = 0.0
    for m0 in range(0, N, BLOCK_M):
        q, a = _pool(A + at_a, gram, a_rows, t_live, m0, N, stride_gram, BLOCK_T, BLOCK_M, BLOCK_N, PRECISION)
        m = m0 + tl.arange(0, BLOCK_M)
        inv_p = tl.load(INV_P + (image_begin + image) * N + m, mask=m < N, other=0.0)
        s = _scores_of(a, stat, scale)
        centred = s - slope[:, None] * q - constant[:, None]
        ds = a * g[:, None]
        if NEEDS_TAU:
            tau_sum += tl.sum(tl.sum(ds * centred * (s - u[:, None]), 1), 0)
        w = ds * (1.0 + centred / tau) * inv_t[:, None] * inv_p[None, :]
        at_w = a_rows[:, None] + m[None, :]
        tl.store(W + at_a + at_w, w.to(W.dtype.element_ty), mask=t_live[:, None] & (m < N)[None, :])
    if NEEDS_TAU:
        tl.store(TAU_SUMS + tl.program_id(0), tau_sum)


@triton.jit(do_not_specialize=("image_begin", "N", "K"))
def curvature_kernel(
    A, CURVATURE, INV_P, C, image_begin, N, K, stride_a,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, N_ALIGN: tl.constexpr,
    ADD: tl.constexpr, OPERANDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """C `[images, N, N]` (+)= -Σ_k curvature_k a_kn a_km / (‖p_n‖ ‖p_m‖): times P, what r adds to ∂L/∂P."""
    N = N // N_ALIGN * N_ALIGN  # tells the compiler how rows of A are aligned
    tiles = tl.cdiv(N, BLOCK_M)
    image = tl.program_id(0) // (tiles * tiles)
    tile = tl.program_id(0) % (tiles * tiles)
    n = tile // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    m = tile % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    acc = tl.zeros([BLOCK_M, BLOCK_M], tl.float32)
    rows = A + image * N + (tl.arange(0, BLOCK_K) * stride_a)[:, None]
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        known = (k < K)[:, None]
        left = tl.load(rows + n[None, :], mask=known & (n < N)[None, :], other=0.0)
        right = tl.load(rows + m[None, :], mask=known & (m < N)[None, :], other=0.0)
        factor = tl.load(CURVATURE + image * K + k, mask=k < K, other=0.0)
        left = left.to(tl.float32) * factor[:, None]  # beyond the range of float16, hence bfloat16 operands
        if not INTERPRETED:
            left = left.to(OPERANDS)
        acc = tl.dot(left.T, right.to(left.dtype), acc, input_precision=PRECISION)
        rows += BLOCK_K * stride_a
    inv = INV_P + (image_begin + image) * N
    acc *= tl.load(inv + n, mask=n < N, other=0.0)[:, None] * tl.load(inv + m, mask=m < N, other=0.0)[None, :]
    at = C + (image.to(tl.int64) * N + n)[:, None] * N + m[None, :]
    live = (n < N)[:, None] & (m < N)[None, :]
    acc = -acc
    if ADD:
        acc += tl.load(at, mask=live, other=0.0)
    tl.store(at, acc.to(C.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=("image_begin", "image_end", "N", "K", "stride_phi"))
def max_weights_kernel(
    INV_P, INV_T, INDEX, G, W_SCALE, W, image_begin, image_end, N, K, stride_phi, stride_w,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """W `[K, rows]` of the `max` form: g / (‖p‖ ‖t‖) at the patch that won, 0 elsewhere."""
    text_tiles = tl.cdiv(K, BLOCK_T)
    row0 = tl.program_id(0) // text_tiles * BLOCK_P
    text0 = tl.program_id(0) % text_tiles * BLOCK_T
    at_row = row0 + tl.arange(0, BLOCK_P)
    texts = text0 + tl.arange(0, BLOCK_T)
    image = image_begin + at_row // N
    n = at_row % N
    t_live, p_live = texts < K, image < image_end
    known = t_live[:, None] & p_live[None, :]
    at = image.to(tl.int64)[None, :] * stride_phi + texts[:, None]
    won = tl.load(INDEX + at, mask=known, other=-1.0) == n.to(tl.float32)[None, :]
    inv_t = tl.load(INV_T + texts, mask=t_live, other=0.0)
    inv_p = tl.load(INV_P + image_begin * N + at_row, mask=p_live, other=0.0)
    w = tl.load(G + at, mask=known & won, other=0.0) * inv_t[:, None] * inv_p[None, :]
    if SCALED:
        w *= tl.load(W_SCALE)
    w = tl.where(won, w, 0.0)
    base = W + text0.to(tl.int64) * stride_w + row0
    tl.store(base + ((texts - text0) * stride_w)[:, None] + (at_row - row0)[None, :], w.to(W.dtype.element_ty))


@triton.jit(do_not_specialize=("rows_count", "N"))
def inverse_norms_kernel(
    X, MASK, INV, rows_count, N, D, stride_b, stride_n, stride_d, stride_mb, stride_mn,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """1 / ‖x‖ of each row of `[rows / N, N, D]`; 0 for a row without a direction and for a masked one."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live, offsets = _rows(MASK, rows, rows_count, N, stride_b, stride_n, stride_mb, stride_mn, HAS_MASK)
    squared = tl.zeros([ROWS], tl.float32)
    for d in range(0, D, BLOCK_D):
        x = _load_row(X, offsets, live, d, D, stride_d, BLOCK_D)
        squared += tl.sum(x * x, 1)
    inverse = tl.where(squared < MIN_NORM_SQUARED, 0.0, 1.0 / tl.sqrt(squared))
    tl.store(INV + rows, inverse, mask=rows < rows_count)


@triton.jit(do_not_specialize=("MASK", "rows_count", "N"))
def project_out_kernel(
    GRAD, X, OUT, MASK, W_SCALE, rows_count, N, D, stride_b, stride_n, stride_d, stride_mb, stride_mn,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, HAS_MASK: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """OUT = GRAD - (GRAD · x) x / ‖x‖² by rows: what points along x does not change its direction.

    GRAD and OUT are contiguous `[rows, D]` and may be the same memory. Twice, because the first projection leaves along
    x its own rounding, which is all there is where D = 1. From GRAD itself, so that the rounding of W along x cancels.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live, offsets = _rows(MASK, rows, rows_count, N, stride_b, stride_n, stride_mb, stride_mn, HAS_MASK)
    at = rows.to(tl.int64) * D
    squared = tl.zeros([ROWS], tl.float32)
    along = tl.zeros([ROWS], tl.float32)
    for d in range(0, D, BLOCK_D):
        x = _load_row(X, offsets, live, d, D, stride_d, BLOCK_D)
        grad = _load_row(GRAD, at, live, d, D, 1, BLOCK_D)
        squared += tl.sum(x * x, 1)
        along += tl.sum(grad * x, 1)
    inverse = tl.where(squared < MIN_NORM_SQUARED, 0.0, 1.0 / squared)
    along *= inverse
    rest = tl.zeros([ROWS], tl.float32)
    for d in range(0, D, BLOCK_D):
        x = _load_row(X, offsets, live, d, D, stride_d, BLOCK_D)
        grad = _load_row(GRAD, at, live, d, D, 1, BLOCK_D)
        rest += tl.sum((grad - along[:, None] * x) * x, 1)
    rest *= inverse
    undo = 1.0 / tl.load(W_SCALE) if SCALED else 1.0
    # A row without a direction has W = 0 and so GRAD = 0 already.
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        x = _load_row(X, offsets, live, d, D, stride_d, BLOCK_D)
        grad = _load_row(GRAD, at, live, d, D, 1, BLOCK_D)
        out = (grad - along[:, None] * x - rest[:, None] * x) * undo
        inside = (rows < rows_count)[:, None] & (offs_d < D)[None, :]
        tl.store(OUT + at[:, None] + offs_d[None, :], out.to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def _rows(MASK, rows, rows_count, N, stride_b, stride_n, stride_mb, stride_mn, HAS_MASK: tl.constexpr):
    """Whether each row counts, and its offset in a tensor `[rows / N, N, D]`."""
    live = rows < rows_count
    image = rows // N
    n = rows - image * N
    if HAS_MASK:
        at = MASK + image.to(tl.int64) * stride_mb + n.to(tl.int64) * stride_mn
        live &= tl.load(at, mask=live, other=0) != 0
    return live, image.to(tl.int64) * stride_b + n.to(tl.int64) * stride_n


@triton.jit
def _load_row(X, offsets, live, d, D, stride_d, BLOCK_D: tl.constexpr):
    """`[ROWS, BLOCK_D]` in float32, 0 for rows that do not count, which are not read."""
    offs_d = (d + tl.arange(0, BLOCK_D)).to(tl.int64)
    mask = live[:, None] & (offs_d < D)[None, :]
    return tl.load(X + offsets[:, None] + (offs_d * stride_d)[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit(
    do_not_specialize=("LARGEST", "LOG", "rows_count", "length"),
    do_not_specialize_on_alignment=("stride_row", "stride"),  # but on 1: then neighbours are loaded together
)
def shifted_logsumexp_kernel(
    PHI, SCALE, BIAS, LARGEST, LOG, rows_count, length, stride_row, stride,
    SCALE_IS_TENSOR: tl.constexpr, BIAS_IS_TENSOR: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each row of the logits the maximum m and log Σ exp(logit - m), apart: their sum would round away a saturated
    loss. With the strides exchanged, of each column.
    """
    scale, bias = _scalar(SCALE, SCALE_IS_TENSOR), _scalar(BIAS, BIAS_IS_TENSOR)
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
    """SUMS gets each program's part of Σ softplus(-y logit)."""
    scale, bias = _scalar(SCALE, SCALE_IS_TENSOR), _scalar(BIAS, BIAS_IS_TENSOR)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS], tl.float32)
    for begin in range(0, B, BLOCK):
        cols = begin + tl.arange(0, BLOCK)
        known = (rows < B)[:, None] & (cols < B)[None, :]
        logits = tl.load(PHI + rows.to(tl.int64)[:, None] * B + cols[None, :], mask=known, other=0.0) * scale + bias
        x = tl.where(rows[:, None] == cols[None, :], -logits, logits)
        small = tl.exp(-tl.abs(x))
        above = 1.0 + small  # log1p: what 1 + small rounds away is put back
        log1p = tl.where(above == 1.0, small, tl.log(above) * small / tl.where(above == 1.0, 1.0, above - 1.0))
        softplus = tl.where(x > 0.0, x, 0.0) + log1p
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
    """∂L/∂φ `[B, B]` in one pass, and each program's part of the sums for logit scale and bias."""
    scale, bias = _scalar(SCALE, SCALE_IS_TENSOR), _scalar(BIAS, BIAS_IS_TENSOR)
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
        scale_part, bias_part = _sum_pair(tl.where(known, grad * phi, 0.0), grad, 1)
        scale_sum += scale_part
        bias_sum += bias_part
        tl.store(GRAD_PHI + at, grad * scale, mask=known)
    tl.store(SCALE_SUMS + tl.program_id(0), tl.sum(scale_sum, 0))
    tl.store(BIAS_SUMS + tl.program_id(0), tl.sum(bias_sum, 0))


@triton.jit
def _source_score(SCORES, at, live, LARGEST: tl.constexpr):
    """Scores at those offsets in float32; a NaN stays one."""
    s = tl.load(SCORES + at, mask=live, other=0.0).to(tl.float32)
    s = tl.maximum(s, -LARGEST, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(s, LARGEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit(do_not_specialize=("C", "source_h", "source_w", "H", "W"))
def upsample_argmax_kernel(
    SCORES, ROW, ROW_WEIGHT, COLUMN, COLUMN_WEIGHT, SCALE, LABELS, BEST, ENTROPY,
    C, source_h, source_w, H, W, stride_b, stride_c, stride_h, stride_w,
    SCALE_IS_TENSOR: tl.constexpr, LARGEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """LABELS (BEST, ENTROPY) `[B, H, W]` of SCORES `[B, C, source_h, source_w]`, a block of an image's pixels.

    ROW, COLUMN and their weights say between which elements a pixel lies. One pass over the classes: both sums of the
    softmax are kept relative to the best score so far.
    """
    blocks = tl.cdiv(H * W, BLOCK)
    image = tl.program_id(0) // blocks
    pixel = (tl.program_id(0) - image * blocks) * BLOCK + tl.arange(0, BLOCK)
    live = pixel < H * W
    y = pixel // W
    x = pixel - y * W
    top = tl.load(ROW + y, mask=live, other=0)
    left = tl.load(COLUMN + x, mask=live, other=0)
    down = tl.load(ROW_WEIGHT + y, mask=live, other=0.0)
    along = tl.load(COLUMN_WEIGHT + x, mask=live, other=0.0)
    # A pixel on an element reads only that: the next may be NaN.
    bottom = tl.minimum(tl.where(down > 0.0, top + 1, top), source_h - 1).to(tl.int64) * stride_h
    right = tl.minimum(tl.where(along > 0.0, left + 1, left), source_w - 1).to(tl.int64) * stride_w
    top = top.to(tl.int64) * stride_h
    left = left.to(tl.int64) * stride_w
    if ENTROPY is not None:
        scale = _scalar(SCALE, SCALE_IS_TENSOR) * LOG2E
        total = tl.zeros([BLOCK], tl.float32)
        weighted = tl.zeros([BLOCK], tl.float32)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    label = tl.zeros([BLOCK], tl.int32)
    of_class = SCORES + image.to(tl.int64) * stride_b
    for c in range(0, C):
        a = _source_score(of_class, top + left, live, LARGEST)
        b = _source_score(of_class, bottom + left, live, LARGEST)
        above = a + along * (_source_score(of_class, top + right, live, LARGEST) - a)
        below = b + along * (_source_score(of_class, bottom + right, live, LARGEST) - b)
        s = above + down * (below - above)
        of_class += stride_c
        wins = ((s > best) | (s != s)) & (best == best)  # the first of equals stays; a NaN wins and stays
        if ENTROPY is not None:
            if c == 0:
                total += 1.0
            else:
                # Both finite and far enough: 2^-200 is 0.
                distance = tl.minimum(tl.maximum((s - best) * scale, -200.0), 200.0)
                e = tl.exp2(-tl.abs(distance))
                # Relative to a new best, each e and each distance of what was summed shrink alike.
                weighted = tl.where(wins, (weighted - distance * total) * e, weighted + distance * e)
                total = tl.where(wins, total * e + 1.0, total + e)
        best = tl.where(wins, s, best)
        label = tl.where(wins, c, label)
    at = image.to(tl.int64) * H * W + pixel
    tl.store(LABELS + at, label.to(tl.int16), mask=live)
    if BEST is not None:
        tl.store(BEST + at, best, mask=live)
    if ENTROPY is not None:
        entropy = tl.where(best == best, (tl.log2(total) - weighted / total) / LOG2E, best)
        tl.store(ENTROPY + at, entropy, mask=live)
