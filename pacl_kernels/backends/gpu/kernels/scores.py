"""Tile of products of texts and patches, and the patches of its columns."""

import triton
import triton.language as tl

from .shared import INTERPRETED


@triton.jit
def load_part(
    X, offsets, live, row0, d, D, stride_d, BLOCK_D: tl.constexpr, DESCRIPTORS: tl.constexpr, EVEN_D: tl.constexpr
):
    """Return the dimensions from `d` on of the rows from `row0` on, which lie at `offsets`."""
    if DESCRIPTORS:
        part = X.load([row0, d])
    else:
        offs_d = (d + tl.arange(0, BLOCK_D)).to(tl.int64)
        mask = live[:, None]
        if not EVEN_D:
            mask &= offs_d[None, :] < D
        part = tl.load(X + offsets[:, None] + (offs_d * stride_d)[None, :], mask=mask, other=0.0)
    if INTERPRETED:  # the interpreter's tl.dot reads the bits of a bfloat16 as an integer
        part = part.to(tl.float32)
    return part


@triton.jit
def product(
    P, T, p_offsets, p_live, row0, t_offsets, t_live, text0, D, stride_pd, stride_td,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return raw products `[BLOCK_T, BLOCK_P]` of the texts from `text0` on and the patches from row `row0` on."""
    acc = tl.zeros([BLOCK_T, BLOCK_P], tl.float32)
    for d in range(0, D, BLOCK_D):
        t = load_part(T, t_offsets, t_live, text0, d, D, stride_td, BLOCK_D, DESCRIPTORS, EVEN_D)
        p = load_part(P, p_offsets, p_live, row0, d, D, stride_pd, BLOCK_D, DESCRIPTORS, EVEN_D)
        acc = tl.dot(t, p.T, acc, input_precision=PRECISION)
    return acc


@triton.jit
def patch_columns(
    MASK, image0, row0, image_end, N, stride_pb, stride_pn, stride_mb, stride_mn,
    BLOCK_P: tl.constexpr, PAD: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Return the row in `[B N]` of each column, the offset of its patch, and True if it is a patch and not masked."""
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
