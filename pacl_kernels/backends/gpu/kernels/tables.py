"""Tables of packed images `[ΣN, D]`, None where all images have N patches.

    STARTS int32 [B + 1], the first row of each image     ROW_IMAGE int32 [ΣN], the image of each row
    ITEMS int32 [programs, 2], image (its number in the block) and tile of each program
    SQUARES int64 [B + 1], where the matrix of each image begins, N rows of `row_pitch(N)` elements

The attention `[texts, row_pitch(N)]` of an image begins at `attention_column` times the texts of the block. Kernels
that go by rows alone take packed images as images of one patch each.
"""

import triton
import triton.language as tl

from ..tiles import PACKED_ALIGNMENT

ALIGNMENT = tl.constexpr(PACKED_ALIGNMENT)


@triton.jit
def image_tile(ITEMS, STARTS, image_begin):
    """Return the image of a program (its number in the block), its tile, its patches, and its first row.

    The last number is the image's first row in the block, which begins with image `image_begin`.
    """
    item = ITEMS + 2 * tl.program_id(0)
    image = tl.load(item)
    start = STARTS + image_begin + image
    row = tl.load(start)
    return image, tl.load(item + 1), tl.load(start + 1) - row, row, row - tl.load(STARTS + image_begin)


@triton.jit
def row_pitch(N):
    return tl.cdiv(N, ALIGNMENT) * ALIGNMENT


@triton.jit
def attention_column(image, row):
    """Return a multiple of 16 at which an image begins whose first row is `row`; both are numbers in the block.

    There is room for `row_pitch(N)` columns, because the next image begins at most 15 + N columns later.
    """
    return ((row + (ALIGNMENT - 1) * image) // ALIGNMENT * ALIGNMENT).to(tl.int64)


@triton.jit
def square(SQUARES, image, image_begin):
    """Return where the matrix of an image begins in those of the block."""
    return tl.load(SQUARES + image_begin + image) - tl.load(SQUARES + image_begin)
