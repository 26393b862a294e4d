"""The size of a block of images and texts, and its buffers in the workspace."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import tiles
from .problem import Block, Problem

WORKSPACE = 256 * 2**20  # bytes of all buffers of a block
ALIGNED_ROWS = 8  # patches of every block but the last are a multiple of this


class BlockSize(NamedTuple):
    """Number of images and texts of a block, which is in memory at once."""

    images: int
    texts: int


class WeightsTile(NamedTuple):
    """Number of texts and rows of a tile of W, and True if neighbours in memory are texts."""

    texts: int
    rows: int
    transposed: bool = False


def text_block(n: int, k: int, itemsize: int) -> int:
    """Return the number of texts against which at least one image fits into the workspace."""
    return min(k, max(128, WORKSPACE // (itemsize * n) // 128 * 128))


def plan_blocks(b: int, n: int, k: int, itemsize: int, image_bytes: int = 0) -> BlockSize:
    """Return the block that fits into the workspace with `itemsize` bytes per score and `image_bytes` per image."""
    texts = text_block(n, k, itemsize)
    tile = min(128, max(16, tiles.power_of_two(texts)))
    images = WORKSPACE // (itemsize * n * tiles.ceil_div(texts, tile) * tile + image_bytes)
    if images > ALIGNED_ROWS:  # the library's products take half as long if the rows fill whole vectors
        images -= images % (ALIGNED_ROWS // math.gcd(n, ALIGNED_ROWS))
    return BlockSize(max(1, min(b, images)), texts)


def gram_blocks(p: Problem) -> BlockSize:
    """Return the block for the Gram matrices alone."""
    return BlockSize(max(1, min(p.b, WORKSPACE // _gram_bytes(p))), p.k)


def attention_blocks(p: Problem) -> BlockSize:
    """Return the block for the attention and the Gram matrices."""
    itemsize = p.gram_dtype.itemsize
    return plan_blocks(p.b, p.n, p.k, itemsize, _gram_bytes(p) + _padding_bytes(p, itemsize))


def score_bytes(p: Problem, form: str) -> int:
    """Return the bytes that the backward keeps per score: W, and for the cosine form the attention."""
    return p.patches.element_size() + (p.gram_dtype.itemsize if form == "cosine" else 0)


def backward_blocks(p: Problem, form: str, widened: bool) -> BlockSize:
    """Return the block for all buffers of the backward. `widened`: the gradient of patches is summed in float32."""
    itemsize = score_bytes(p, form)
    image_bytes = p.n * (4 * p.d * widened + p.patches.element_size() * p.d * (p.mask is not None))
    if form == "cosine":  # Gram matrix and norm term
        image_bytes += p.n * (p.n + 16) * (4 + p.gram_dtype.itemsize) + _padding_bytes(p, itemsize)
    return plan_blocks(p.b, p.n, p.k, itemsize, image_bytes)


def _gram_bytes(p: Problem) -> int:
    """Return the bytes of the Gram matrix of one image."""
    return p.n * tiles.ceil_div(p.n, 16) * 16 * p.gram_dtype.itemsize


def _padding_bytes(p: Problem, itemsize: int) -> int:
    """Return the bytes past column N in the attention of one image, for a block with `itemsize` bytes per score."""
    size = p.gram_dtype.itemsize
    return (tiles.pitch(p.n, size) - p.n) * text_block(p.n, p.k, itemsize) * size


def weights(p: Problem, size: BlockSize, tile: WeightsTile) -> Tensor:
    """Allocate W `[texts, rows]` of a block in whole tiles."""
    texts = tiles.ceil_div(min(p.k, size.texts), tile.texts) * tile.texts
    rows = tiles.ceil_div(min(p.b, size.images) * p.n, tile.rows) * tile.rows
    return p.patches.new_empty(rows, texts).T if tile.transposed else p.patches.new_empty(texts, rows)


def attention(p: Problem, size: BlockSize, dtype: torch.dtype) -> Tensor:
    """Allocate the attention `[images, texts, pitch]`, with rows at multiples of 16 bytes.

    It is zeroed, because rows are read whole and nothing writes past column N.
    """
    return p.patches.new_zeros(*size, tiles.pitch(p.n, dtype.itemsize), dtype=dtype)


def attention_of(block: Block, room: Tensor) -> Tensor:
    """Return the part of `attention` that a block takes, without gaps between images."""
    part: Tensor = room.flatten(0, 1)[: block.images * block.texts].unflatten(0, (block.images, block.texts))
    return part


def gram(p: Problem, size: BlockSize) -> Tensor:
    """Allocate Gram matrices `[images, N, N]`, with rows padded to a multiple of 16 elements."""
    return p.patches.new_empty(size.images, p.n, tiles.ceil_div(p.n, 16) * 16, dtype=p.gram_dtype)


def norm_term(p: Problem, size: BlockSize, dtype: torch.dtype) -> Tensor:
    """Allocate the norm term C `[images, N, N]`, with rows padded to a multiple of 8 elements."""
    step = tiles.NORM_TERM_ALIGNMENT
    return p.patches.new_empty(size.images, p.n, tiles.ceil_div(p.n, step) * step, dtype=dtype)[:, :, : p.n]
