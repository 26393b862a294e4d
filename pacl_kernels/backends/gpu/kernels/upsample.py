"""Best class of each pixel."""

import triton
import triton.language as tl

from .shared import LOG2E, scalar


@triton.jit
def _source_score(SCORES, at, live, LARGEST: tl.constexpr):
    """Load scores as float32, clamped to ±LARGEST; NaN stays NaN."""
    s = tl.load(SCORES + at, mask=live, other=0.0).to(tl.float32)
    s = tl.maximum(s, -LARGEST, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(s, LARGEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit(do_not_specialize=("C", "source_h", "source_w", "H", "W"))
def upsample_argmax_kernel(
    SCORES, ROW, ROW_FRACTION, COLUMN, COLUMN_FRACTION, SCALE, LABELS, BEST, ENTROPY,
    C, source_h, source_w, H, W, stride_b, stride_c, stride_h, stride_w,
    SCALE_IS_TENSOR: tl.constexpr, LARGEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write LABELS, BEST and ENTROPY `[B, H, W]` of SCORES `[B, C, source_h, source_w]`.

    Each program takes a block of pixels of one image. ROW, COLUMN and their fractions give the elements between which a
    pixel lies. There is one pass over the classes: both sums of the softmax are relative to the best score so far.
    """
    blocks = tl.cdiv(H * W, BLOCK)
    image = tl.program_id(0) // blocks
    pixel = (tl.program_id(0) - image * blocks) * BLOCK + tl.arange(0, BLOCK)
    live = pixel < H * W
    y = pixel // W
    x = pixel - y * W
    top = tl.load(ROW + y, mask=live, other=0)
    left = tl.load(COLUMN + x, mask=live, other=0)
    down = tl.load(ROW_FRACTION + y, mask=live, other=0.0)
    along = tl.load(COLUMN_FRACTION + x, mask=live, other=0.0)
    # A pixel on an element reads only that: the next may be NaN.
    bottom = tl.minimum(tl.where(down > 0.0, top + 1, top), source_h - 1).to(tl.int64) * stride_h
    right = tl.minimum(tl.where(along > 0.0, left + 1, left), source_w - 1).to(tl.int64) * stride_w
    top = top.to(tl.int64) * stride_h
    left = left.to(tl.int64) * stride_w
    if ENTROPY is not None:
        scale = scalar(SCALE, SCALE_IS_TENSOR) * LOG2E
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
        wins = ((s > best) | (s != s)) & (best == best)  # the first of equal scores stays; a NaN wins and stays
        if ENTROPY is not None:
            if c == 0:
                total += 1.0
            else:
                # Clamped to stay finite; 2^-200 is 0.
                distance = tl.minimum(tl.maximum((s - best) * scale, -200.0), 200.0)
                e = tl.exp2(-tl.abs(distance))
                # A new best score scales every earlier e and shifts every earlier distance alike.
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
