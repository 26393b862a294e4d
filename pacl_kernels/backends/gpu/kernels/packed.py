"""Compatibility φ of packed images, for the `dot` and the `max` form; `tables.py` describes the tables."""

import triton
import triton.language as tl

from .largest import add_largest, max_result
from .scores import patch_columns, product
from .shared import LOG2E, scalar
from .softmax import RUNNING_MAX_BELOW, add_softmax, softmax_result


@triton.jit(do_not_specialize=("runs", "K"))
def packed_forward_kernel(
    P, T, MASK, TAU, INV_P, INV_T, STARTS, RUNS, PHI, STATE,
    runs, K, D, stride_pn, stride_pd, stride_tk, stride_td, stride_mn,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
    MAX: tl.constexpr, RUNNING_MAX: tl.constexpr, TAU_IS_TENSOR: tl.constexpr, HAS_MASK: tl.constexpr,
    DESCRIPTORS: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write φ and STATE of the `dot` form, or with MAX of the `max` form.

    A program takes runs of images against one tile of texts; RUNS has the first image of each run and the one after
    it. Tiles follow each other without padding, and a tile is gone over once for each image in it. An image without a
    patch is in the tile where it would begin. For RUNNING_MAX see `compatibility_forward_kernel`.
    """
    tau = scalar(TAU, TAU_IS_TENSOR)
    scale = LOG2E / tau
    text_tiles = tl.cdiv(K, BLOCK_T)
    items = text_tiles * runs
    if TAU_IS_TENSOR:
        items = tl.where((tau < RUNNING_MAX_BELOW) == RUNNING_MAX, items, 0)
    cols = tl.arange(0, BLOCK_P)
    EMPTY: tl.constexpr = -1.0 if MAX else 0.0  # `total` is Σ e, or the winner's index
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        text0 = item % text_tiles * BLOCK_T
        run = item // text_tiles
        image = tl.load(RUNS + 2 * run)
        image_end = tl.load(RUNS + 2 * run + 1)
        row_begin = tl.load(STARTS + image)
        row_end = tl.load(STARTS + image_end)
        texts = text0 + tl.arange(0, BLOCK_T)
        t_live = texts < K
        t_offsets = texts.to(tl.int64) * stride_tk
        inv_t = tl.load(INV_T + texts, mask=t_live, other=0.0)
        total = tl.zeros([BLOCK_T], tl.float32) + EMPTY
        weighted = tl.zeros([BLOCK_T], tl.float32)
        largest = tl.full([BLOCK_T], float("-inf"), tl.float32)
        for tile in range(tl.maximum(tl.cdiv(row_end - row_begin, BLOCK_P), 1)):
            row0 = row_begin + tile * BLOCK_P
            rows, p_offsets, p_live = patch_columns(
                MASK, 0, row0, row_end, 1, stride_pn, 0, stride_mn, 0, BLOCK_P, 0, HAS_MASK
            )
            acc = product(
                P, T, p_offsets, p_live, row0, t_offsets, t_live, text0, D, stride_pd, stride_td,
                BLOCK_T, BLOCK_P, BLOCK_D, DESCRIPTORS, EVEN_D, PRECISION,
            )  # fmt: skip
            inv_p = tl.load(INV_P + rows, mask=p_live, other=0.0)
            s = acc * inv_p[None, :] * inv_t[:, None]  # rounded as in the backward
            more = image < image_end
            while more:
                begin = tl.load(STARTS + image) - row0
                end = tl.load(STARTS + image + 1) - row0
                inside = (p_live & (cols >= begin) & (cols < end))[None, :]
                if MAX:
                    largest, total = add_largest(s, -begin, inside, largest, total, 1)
                else:
                    total, weighted, largest = add_softmax(
                        s, inside, scale, total, weighted, largest, True, RUNNING_MAX, 1
                    )
                if end <= BLOCK_P:
                    if MAX:
                        phi, state = max_result(largest, total)
                    else:
                        phi, state = softmax_result(total, weighted, largest, scale, RUNNING_MAX)
                    at = image.to(tl.int64) * K + texts
                    tl.store(PHI + at, phi, mask=t_live)
                    tl.store(STATE + at, state, mask=t_live)
                    total = tl.zeros([BLOCK_T], tl.float32) + EMPTY
                    weighted = tl.zeros([BLOCK_T], tl.float32)
                    largest = tl.full([BLOCK_T], float("-inf"), tl.float32)
                    image += 1
                more = (end <= BLOCK_P) & (image < image_end)
