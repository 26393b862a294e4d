"""Attention a of each patch and text from φ and STATE, and the kernel that writes it for the cosine form."""

import triton
import triton.language as tl

from .scores import patch_columns, product
from .shared import LOG2E, fma, round_to, scalar
from .tables import attention_column, row_pitch


@triton.jit
def _of_two(X, at, stride, known, known_later, later, IMAGES: tl.constexpr):
    """Load X `[texts, 1]` of one image or, in the columns `later`, of the next."""
    x = tl.load(X + at, mask=known, other=0.0)[:, None]
    if IMAGES == 2:
        x = tl.where(later[None, :], tl.load(X + at + stride, mask=known_later, other=0.0)[:, None], x)
    return x


@triton.jit
def pair_values(
    STATE, PHI, G, cols, rows, texts, t_live, p_live, row0, first_row, image_end, N, stride_phi, IMAGES: tl.constexpr,
):  # fmt: skip
    """Load STATE, PHI and G for each text and the image of each column, 0 where one is None.

    The columns `cols` belong to the tile that begins at `row0`; they are the rows `rows`, from `first_row` on.
    """
    phi, g = 0.0, 0.0
    first = first_row // N
    if IMAGES > 2:
        at = (rows // N).to(tl.int64)[None, :] * stride_phi + texts[:, None]
        known = t_live[:, None] & p_live[None, :]
        state = tl.load(STATE + at, mask=known, other=0.0)
        if PHI is not None:
            phi = tl.load(PHI + at, mask=known, other=0.0)
        if G is not None:
            g = tl.load(G + at, mask=known, other=0.0)
    else:
        at = first.to(tl.int64) * stride_phi + texts
        known = t_live & (first < image_end)
        later = cols >= (first + 1) * N - row0
        known_later = t_live & (first + 1 < image_end)
        state = _of_two(STATE, at, stride_phi, known, known_later, later, IMAGES)
        if PHI is not None:
            phi = _of_two(PHI, at, stride_phi, known, known_later, later, IMAGES)
        if G is not None:
            g = _of_two(G, at, stride_phi, known, known_later, later, IMAGES)
    return state, phi, g


@triton.jit
def attention_of(s, PHI, phi, state, scale):
    """Return the attention a, and s - φ, or s itself if PHI is None.

    Compile callers without FMA contraction: s must be rounded before φ is subtracted, and s / τ before the log-sum-exp
    is subtracted, as in the forward. Where one patch has all the attention, the difference is then exactly 0; with FMA
    it would be a rounding error, which τ divides. `fma` is called where a product need not be rounded.
    """
    if PHI is None:
        centred = s
        a = tl.exp2(s * scale - state)
    else:
        centred = s - phi
        a = tl.exp2(fma(centred, scale, -state))
    return a, centred


@triton.jit
def _attention_quarter(
    acc, col0, inv_t, text0, texts, t_live, row0, image_begin, image_end, at_row,
    MASK, INV_P, PHI, STATE, A, N, scale, stride_mb, stride_mn, stride_phi, stride_image, stride_text,
    COLS: tl.constexpr, IMAGES: tl.constexpr, ALIGN: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Store the attention of the columns of a tile from `col0` on."""
    cols = col0 + tl.arange(0, COLS)
    rows, _, p_live = patch_columns(MASK, 0, row0 + col0, image_end, N, 0, 0, stride_mb, stride_mn, COLS, 0, HAS_MASK)
    inv_p = tl.load(INV_P + rows, mask=p_live, other=0.0)[None, :]
    first = (row0 + col0) // N
    state, phi, _ = pair_values(
        STATE, PHI, None, cols, rows, texts, t_live, p_live, row0, row0 + col0, image_end, N, stride_phi, IMAGES
    )
    inv_t = inv_t[:, None]
    s = acc * inv_p * inv_t
    a, _ = attention_of(s, PHI, phi, state, scale)
    a = tl.where(p_live[None, :], a, 0.0)  # masked columns may hold anything, NaN included
    # One 64-bit address and small offsets: one address per element would take twice the registers.
    base = A + text0.to(tl.int64) * stride_text
    at_text = ((texts - text0) * stride_text)[:, None]
    # Images begin at columns that are multiples of ALIGN, so ALIGN columns are contiguous in memory.
    gap = stride_image - N
    if IMAGES > 2:
        at = cols + (rows // N - first) * gap
    elif IMAGES == 2:
        at = cols + tl.where(cols >= (first + 1) * N - row0, gap, 0)
    else:
        at = cols
    at = tl.max_contiguous(tl.multiple_of(at, [ALIGN]), [ALIGN])
    live = t_live[:, None] & (cols < image_end * N - row0)[None, :]
    base += at_row + (first - image_begin) * gap
    tl.store(base + (at_text + at[None, :]), round_to(a, A.dtype.element_ty), mask=live)


@triton.jit
def _packed_attention_quarter(
    acc, col0, inv_t, text0, texts, t_live, row0, row_begin, row_end, first_image, STARTS, ROW_IMAGE,
    MASK, INV_P, PHI, STATE, A, K, scale, stride_mb, stride_phi, COLS: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Do the same as `_attention_quarter` for packed images, one after the other."""
    row = row0 + col0
    rows, _, p_live = patch_columns(MASK, 0, row, row_end, 1, 0, 0, stride_mb, 0, COLS, 0, HAS_MASK)
    inv_p = tl.load(INV_P + rows, mask=p_live, other=0.0)[None, :]
    s = acc * inv_p * inv_t[:, None]
    if row < row_end:
        first = tl.load(ROW_IMAGE + row)
        last = tl.load(ROW_IMAGE + tl.minimum(row + COLS, row_end) - 1)
        for later in range(last - first + 1):
            image = first + later
            begin = tl.load(STARTS + image)
            end = tl.load(STARTS + image + 1)
            at_pair = image.to(tl.int64) * stride_phi + texts
            state = tl.load(STATE + at_pair, mask=t_live, other=0.0)[:, None]
            phi = 0.0
            if PHI is not None:
                phi = tl.load(PHI + at_pair, mask=t_live, other=0.0)[:, None]
            a, centred = attention_of(s, PHI, phi, state, scale)
            a = tl.where(p_live[None, :], a, 0.0)  # masked columns may hold anything, NaN included
            pitch = row_pitch(end - begin)
            base = A + attention_column(image - first_image, begin - row_begin) * K + text0.to(tl.int64) * pitch
            at = ((texts - text0) * pitch)[:, None] + (rows - begin)[None, :]
            inside = (rows >= begin) & (rows < end) & (rows < row_end)
            tl.store(base + at, round_to(a, A.dtype.element_ty), mask=t_live[:, None] & inside[None, :])


@triton.jit(do_not_specialize=("image_begin", "image_end", "N", "K", "stride_phi", "stride_image", "first_image"))
def attention_kernel(
    P, T, MASK, TAU, INV_P, INV_T, PHI, STATE, A,
    image_begin, image_end, N, K, D,
    stride_pb, stride_pn, stride_pd, stride_tk, stride_td, stride_mb, stride_mn, stride_phi, stride_image, stride_text,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, IMAGES: tl.constexpr, ALIGN: tl.constexpr,
    TAU_IS_TENSOR: tl.constexpr, HAS_MASK: tl.constexpr,
    DESCRIPTORS: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
    STARTS=None, ROW_IMAGE=None, first_image=None,
):  # fmt: skip
    """Write the attention A `[images, K, stride_text]` of a block of images, for the cosine form.

    With PHI, φ and STATE are those of the `dot` form; without, STATE is the log-sum-exp. Their rows are `stride_phi`
    apart, so that a block of texts can be a slice. IMAGES: the most images that a quarter of a tile touches.
    Packed images come as images of one patch, see `tables.py`; `first_image` is the first of the block, whereas PHI and
    STATE begin at the first of all. Compile without FMA contraction, see `attention_of`.
    """
    # The divisions tell the compiler how rows are aligned, and where images begin in a row.
    N = N // ALIGN * ALIGN
    stride_image = stride_image // ALIGN * ALIGN
    stride_text = stride_text // ALIGN * ALIGN
    tau = scalar(TAU, TAU_IS_TENSOR)
    scale = LOG2E / tau
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
        for half in tl.static_range(2):
            both = left if half == 0 else right
            first, second = tl.split(tl.permute(tl.reshape(both, [BLOCK_T, 2, QUARTER]), [0, 2, 1]))
            for quarter in tl.static_range(2):
                if STARTS is None:
                    _attention_quarter(
                        first if quarter == 0 else second, (2 * half + quarter) * QUARTER,
                        inv_t, text0, texts, t_live, row0, image_begin, image_end, at_row,
                        MASK, INV_P, PHI, STATE, A, N, scale,
                        stride_mb, stride_mn, stride_phi, stride_image, stride_text,
                        QUARTER, IMAGES, ALIGN, HAS_MASK,
                    )  # fmt: skip
                else:
                    _packed_attention_quarter(
                        first if quarter == 0 else second, (2 * half + quarter) * QUARTER,
                        inv_t, text0, texts, t_live, row0, image_begin, image_end, first_image, STARTS, ROW_IMAGE,
                        MASK, INV_P, PHI, STATE, A, K, scale, stride_mb, stride_phi, QUARTER, HAS_MASK,
                    )  # fmt: skip
