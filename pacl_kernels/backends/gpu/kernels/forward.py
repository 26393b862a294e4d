"""Compatibility φ of the `dot` and the `max` form."""

import triton
import triton.language as tl

from .largest import add_largest, max_result
from .scores import patch_columns, product
from .shared import LOG2E, scalar
from .softmax import RUNNING_MAX_BELOW, add_softmax, softmax_result


@triton.jit(do_not_specialize=("B", "N", "K", "images_per_run"))
def compatibility_forward_kernel(
    P, T, MASK, TAU, INV_P, INV_T, PHI, STATE,
    B, N, K, D, stride_pb, stride_pn, stride_pd, stride_tk, stride_td, stride_mb, stride_mn, images_per_run,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, PAD: tl.constexpr, IMAGES: tl.constexpr,
    MAX: tl.constexpr, RUNNING_MAX: tl.constexpr, TAU_IS_TENSOR: tl.constexpr, HAS_MASK: tl.constexpr,
    DESCRIPTORS: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write φ and STATE of the `dot` form, or with MAX of the `max` form.

    The kernel is persistent: each program takes runs of images against one tile of texts. IMAGES: the most images that
    a tile touches. The host does not read a temperature in device memory: it launches the kernel with and without
    RUNNING_MAX, and the wrong launch has no items. Compile the kernel with RUNNING_MAX without FMA contraction, because
    s - max s must be 0 at the maximum.
    """
    tau = scalar(TAU, TAU_IS_TENSOR)
    scale = LOG2E / tau
    text_tiles = tl.cdiv(K, BLOCK_T)
    items = text_tiles * tl.cdiv(B, images_per_run)
    if TAU_IS_TENSOR:
        items = tl.where((tau < RUNNING_MAX_BELOW) == RUNNING_MAX, items, 0)
    cols = tl.arange(0, BLOCK_P)
    EMPTY: tl.constexpr = -1.0 if MAX else 0.0  # `total` is Σ e, or the winner's index
    # Texts change fastest, so that concurrent programs read the same patches.
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
            rows, p_offsets, p_live = patch_columns(
                MASK, image0, row0, image_end, N, stride_pb, stride_pn, stride_mb, stride_mn, BLOCK_P, PAD, HAS_MASK
            )
            acc = product(
                P, T, p_offsets, p_live, row0, t_offsets, t_live, text0, D, stride_pd, stride_td,
                BLOCK_T, BLOCK_P, BLOCK_D, DESCRIPTORS, EVEN_D, PRECISION,
            )  # fmt: skip
            inv_p = tl.load(INV_P + rows, mask=p_live, other=0.0)
            s = acc * inv_p[None, :] * inv_t[:, None]  # rounded as in the backward and in csrc/cuda
            if PAD > 0:
                one = tl.zeros([BLOCK_T, IMAGES], tl.float32)
                parts = tl.reshape(s, [BLOCK_T, IMAGES, PAD])
                inside = tl.reshape(p_live, [1, IMAGES, PAD])
                if MAX:
                    top, index = add_largest(parts, 0, inside, one + float("-inf"), one - 1.0, 2)
                    phi, state = max_result(top, index)
                else:
                    e_sum, es_sum, top = add_softmax(
                        parts, inside, scale, one, one, one + float("-inf"), True, RUNNING_MAX, 2
                    )
                    phi, state = softmax_result(e_sum, es_sum, top, scale, RUNNING_MAX)
                images = image0 + tl.arange(0, IMAGES)
                at = images.to(tl.int64)[None, :] * K + texts[:, None]
                stored = t_live[:, None] & (images < image_end)[None, :]
                tl.store(PHI + at, phi, mask=stored)
                tl.store(STATE + at, state, mask=stored)
            else:
                for j in tl.static_range(IMAGES):
                    image = image0 + j
                    begin = image * N - row0
                    end = begin + N
                    if (begin < BLOCK_P) & (image < image_end):
                        inside = (p_live & (cols >= begin) & (cols < end))[None, :]
                        if MAX:
                            largest, total = add_largest(s, -begin, inside, largest, total, 1)
                        elif HAS_MASK or (begin > 0) | (end < BLOCK_P):
                            total, weighted, largest = add_softmax(
                                s, inside, scale, total, weighted, largest, True, RUNNING_MAX, 1
                            )
                        else:
                            total, weighted, largest = add_softmax(
                                s, True, scale, total, weighted, largest, False, RUNNING_MAX, 1
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
