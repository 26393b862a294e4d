"""How much of a batch is in memory at once, and the buffers that hold it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import tiles
from .problem import Block, Problem

WORKSPACE = 256 * 2**20  # bytes in memory at once
ALIGNED_ROWS = 8  # patches in a block are a multiple of this, but for the last block


class BlockSize(NamedTuple):
    """Images and texts that are in memory at once."""

    images: int
    texts: int


def text_block(n: int, k: int, itemsize: int) -> int:
    """Texts against which one image at least fits into the workspace."""
    return min(k, max(128, WORKSPACE // (itemsize * n) // 128 * 128))


def plan_blocks(b: int, n: int, k: int, itemsize: int, image_bytes: int = 0) -> BlockSize:
    """What fits into the workspace with `itemsize` bytes for each score and `image_bytes` for each image."""
    texts = text_block(n, k, itemsize)
    tile = min(128, max(16, tiles.power_of_two(texts)))
    images = WORKSPACE // (itemsize * n * tiles.ceil_div(texts, tile) * tile + image_bytes)
    if images > ALIGNED_ROWS:  # the library takes half as long for the products of a block with whole vectors of rows
        images -= images % (ALIGNED_ROWS // math.gcd(n, ALIGNED_ROWS))
    return BlockSize(max(1, min(b, images)), texts)


def gram_blocks(p: Problem) -> BlockSize:
    """For the Gram matrices alone."""
    return BlockSize(max(1, min(p.b, WORKSPACE // _gram_bytes(p))), p.k)


def attention_blocks(p: Problem) -> BlockSize:
    """For the attention and the Gram matrices."""
    itemsize = p.gram_dtype.itemsize
    return plan_blocks(p.b, p.n, p.k, itemsize, _gram_bytes(p) + _padding_bytes(p, itemsize))


def score_bytes(p: Problem, form: str) -> int:
    """Bytes that the backward keeps for each score: W, and for the cosine form the attention."""
    return p.patches.element_size() + (p.gram_dtype.itemsize if form == "cosine" else 0)


def backward_blocks(p: Problem, form: str, widened: bool) -> BlockSize:
    """For all that the backward keeps. `widened`: the patches' gradient is summed in float32."""
    itemsize = score_bytes(p, form)
    image_bytes = p.n * (4 * p.d * widened + p.patches.element_size() * p.d * (p.mask is not None))
    if form == "cosine":  # Gram matrix and norm term
        image_bytes += p.n * (p.n + 16) * (4 + p.gram_dtype.itemsize) + _padding_bytes(p, itemsize)
    return plan_blocks(p.b, p.n, p.k, itemsize, image_bytes)


def _gram_bytes(p: Problem) -> int:
    """Bytes of one image's Gram matrix."""
    return p.n * tiles.ceil_div(p.n, 16) * 16 * p.gram_dtype.itemsize


def _padding_bytes(p: Problem, itemsize: int) -> int:
    """Bytes past column N of one image's attention, where a text takes `itemsize` bytes for each score."""
    size = p.gram_dtype.itemsize
    return (tiles.pitch(p.n, size) - p.n) * text_block(p.n, p.k, itemsize) * size


def weights(p: Problem, size: BlockSize, tile: tuple[int, int]) -> Tensor:
    """Room for whole tiles of W `[texts, rows]` of a block; `tile`: texts and rows of one."""
    shape = min(p.k, size.texts), min(p.b, size.images) * p.n
    return p.patches.new_empty([tiles.ceil_div(x, step) * step for x, step in zip(shape, tile, strict=True)])


def attention(p: Problem, size: BlockSize, dtype: torch.dtype) -> Tensor:
    """`[images, texts, pitch]`, rows at multiples of 16 bytes.

    Zeros, for rows are read whole: what lies past column N stays as it is.
    """
    return p.patches.new_zeros(*size, tiles.pitch(p.n, dtype.itemsize), dtype=dtype)


def attention_of(block: Block, room: Tensor) -> Tensor:
    """The part of `attention` that a block takes, without gaps between images."""
    return room.flatten(0, 1)[: block.images * block.texts].unflatten(0, (block.images, block.texts))


def gram(p: Problem, size: BlockSize) -> Tensor:
    """`[images, N, N]`, rows of a multiple of 16 elements."""
    return p.patches.new_empty(size.images, p.n, tiles.ceil_div(p.n, 16) * 16, dtype=p.gram_dtype)


def norm_term(p: Problem, size: BlockSize, dtype: torch.dtype) -> Tensor:
    """C `[images, N, N]`, rows at multiples of 16 bytes."""
    step = tiles.NORM_TERM_ALIGNMENT
    return p.patches.new_empty(size.images, p.n, tiles.ceil_div(p.n, step) * step, dtype=dtype)[:, :, : p.n]
