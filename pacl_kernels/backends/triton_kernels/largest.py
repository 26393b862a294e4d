"""The `max` form: the first of the largest cosines, and the weights of its gradients."""

import triton
import triton.language as tl


@triton.jit
def add_largest(s, first_n, inside, best, index, AXIS: tl.constexpr):
    """The first maximum of `best` so far and the columns `inside`, whose first is patch `first_n`. NaN wins, as inf."""
    key = tl.where(inside, tl.where(s != s, float("inf"), s), float("-inf"))
    top, at = tl.max(key, AXIS, return_indices=True, return_indices_tie_break_left=True)
    higher = top > best
    return tl.where(higher, top, best), tl.where(higher, (first_n + at).to(tl.float32), index)


@triton.jit
def max_result(best, index):
    phi = tl.where(best == float("inf"), float("nan"), best)
    return tl.where(index < 0.0, 0.0, phi), index


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
