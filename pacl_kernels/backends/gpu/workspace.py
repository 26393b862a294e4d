"""The size of a block of images and texts, and its buffers in the workspace."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...packed import starts_of
from . import tiles
from .blocks import Block
from .problem import Problem

WORKSPACE = 256 * 2**20  # bytes of all buffers of a block
ALIGNED_ROWS = 8  # patches of every block but the last are a multiple of this


class BlockSize(NamedTuple):
    """Number of images and texts of a block, which is in memory at once."""

    images: int
    texts: int
    bounds: tuple[int, ...] = ()  # of packed images: where each block begins, and the end of the last

    def of_images(self, p: Problem) -> Iterator[Block]:
        """Yield the blocks of images of a problem, each with all texts; blocks without a patch are left out."""
        if not self.bounds:
            yield from p.pairs.by_images(self.images)
        for b0, b1 in itertools.pairwise(self.bounds):
            block = Block(b0, b1, 0, p.k)
            if p.rows(block).stop > p.rows(block).start:
                yield block

    def most(self, p: Problem, starts: Tensor | None = None) -> int:
        """Return the most rows of a block, or with `starts` `[B + 1]` the most of what these count."""
        if p.packed is None:
            return min(p.b, self.images) * p.n
        return int((p.packed.starts if starts is None else starts)[list(self.bounds)].diff().max())


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
    images = WORKSPACE // (n * _row_bytes(texts, itemsize) + image_bytes)
    if images > ALIGNED_ROWS:  # the library's products take half as long if the rows fill whole vectors
        images -= images % (ALIGNED_ROWS // math.gcd(n, ALIGNED_ROWS))
    return BlockSize(max(1, min(b, images)), texts)


def _row_bytes(texts: int, itemsize: int) -> int:
    """Return the bytes of the scores of a row with whole tiles of texts."""
    tile = min(128, max(16, tiles.power_of_two(texts)))
    return itemsize * tiles.ceil_div(texts, tile) * tile


def _blocks(p: Problem, itemsize: int, bytes_of: Callable[[Any], Any]) -> BlockSize:
    """Return the block of a problem; `bytes_of`: bytes of an image of n patches besides its scores, int or tensor."""
    if p.packed is None:
        return plan_blocks(p.b, p.n, p.k, itemsize, bytes_of(p.n))
    lengths, texts = p.packed.lengths, text_block(p.n, p.k, itemsize)
    ends = starts_of(lengths * _row_bytes(texts, itemsize) + bytes_of(lengths))
    return _packed_blocks(p.packed.starts, texts, ends)


def _packed_blocks(starts: Tensor, texts: int, ends: Tensor) -> BlockSize:
    """Return blocks of packed images; image i has the bytes from `ends[i]` to `ends[i + 1]`."""
    bounds = [0]
    while bounds[-1] < len(ends) - 1:
        b0 = bounds[-1]
        b1 = max(b0 + 1, int(torch.searchsorted(ends, ends[b0] + WORKSPACE, right=True)) - 1)
        if b1 < len(ends) - 1:  # end where the rows fill whole vectors, if that is near
            near = torch.arange(max(b0 + 1, b1 - 4 * ALIGNED_ROWS), b1 + 1)
            whole = near[(starts[near] - starts[b0]) % ALIGNED_ROWS == 0]
            b1 = int(whole[-1]) if len(whole) and whole[-1] - b0 > (b1 - b0) // 2 else b1
        bounds.append(b1)
    return BlockSize(max(b1 - b0 for b0, b1 in itertools.pairwise(bounds)), texts, tuple(bounds))


def gram_blocks(p: Problem) -> BlockSize:
    """Return the block for the Gram matrices alone."""
    return BlockSize(max(1, min(p.b, WORKSPACE // _gram_bytes(p, p.n))), p.k)


def attention_blocks(p: Problem) -> BlockSize:
    """Return the block for the attention and the Gram matrices."""
    itemsize = p.gram_dtype.itemsize
    return _blocks(p, itemsize, lambda n: _gram_bytes(p, n) + _padding_bytes(p, n, itemsize))


def score_bytes(p: Problem, form: str) -> int:
    """Return the bytes that the backward keeps per score: W, and for the cosine form the attention."""
    return p.patches.element_size() + (p.gram_dtype.itemsize if form == "cosine" else 0)


def backward_blocks(p: Problem, form: str, widened: bool) -> BlockSize:
    """Return the block for all buffers of the backward. `widened`: the gradient of patches is summed in float32."""
    itemsize = score_bytes(p, form)

    def bytes_of(n: Any) -> Any:
        found = n * (4 * p.d * widened + p.patches.element_size() * p.d * (p.mask is not None))
        if form == "cosine":  # Gram matrix and norm term
            found += n * (n + 16) * (4 + p.gram_dtype.itemsize) + _padding_bytes(p, n, itemsize)
        return found

    return _blocks(p, itemsize, bytes_of)


def max_blocks(p: Problem) -> BlockSize:
    """Return the block for the float32 gradient of the patches in the backward of the `max` form."""
    if p.packed is not None:
        return _packed_blocks(p.packed.starts, p.k, p.packed.starts * (4 * p.d))
    return BlockSize(max(1, min(p.b, WORKSPACE // (4 * p.n * p.d))), p.k)


def _gram_bytes(p: Problem, n: Any) -> Any:
    """Return the bytes of the Gram matrix of one image."""
    return n * (-(-n // 16) * 16) * p.gram_dtype.itemsize


def _padding_bytes(p: Problem, n: Any, itemsize: int) -> Any:
    """Return the bytes past column N in the attention of one image, for a block with `itemsize` bytes per score."""
    size = p.gram_dtype.itemsize
    padding = tiles.pitch(n, size) - n if p.packed is None else tiles.PACKED_ALIGNMENT - 1
    return padding * text_block(p.n, p.k, itemsize) * size


def weights(p: Problem, size: BlockSize, tile: WeightsTile) -> Tensor:
    """Allocate W `[texts, rows]` of a block in whole tiles."""
    used = min(p.k, size.texts)
    texts = tiles.ceil_div(used, tile.texts) * tile.texts
    rows = tiles.ceil_div(size.most(p), tile.rows) * tile.rows
    if not tile.transposed:
        return p.patches.new_empty(texts, rows)
    w = p.patches.new_empty(rows, texts)
    # No kernel writes the padding, and products sum over it: oneDNN's on AMX read it, times 0, which must not be NaN.
    w[:, used:].zero_()
    return w.T


def attention(p: Problem, size: BlockSize, dtype: torch.dtype) -> Tensor:
    """Allocate the attention `[images, texts, pitch]`, with rows at multiples of 16 bytes.

    It is zeroed, because rows are read whole and nothing writes past column N. That of packed images has one dimension,
    see `kernels/tables.py`; each block zeroes it, because its images begin elsewhere.
    """
    if p.packed is not None:
        starts = p.packed.starts + (tiles.PACKED_ALIGNMENT - 1) * torch.arange(p.b + 1)
        return p.patches.new_empty(size.most(p, starts) * min(p.k, size.texts), dtype=dtype)
    return p.patches.new_zeros(size.images, size.texts, tiles.pitch(p.n, dtype.itemsize), dtype=dtype)


def attention_of(block: Block, room: Tensor) -> Tensor:
    """Return the part of `attention` that a block takes, without gaps between images."""
    if room.dim() == 1:  # packed images
        return room
    part: Tensor = room.flatten(0, 1)[: block.images * block.texts].unflatten(0, (block.images, block.texts))
    return part


def gram(p: Problem, size: BlockSize) -> Tensor:
    """Allocate Gram matrices `[images, N, N]`, with rows padded to a multiple of 16 elements; packed ones in a row."""
    if p.packed is not None:
        return p.patches.new_empty(size.most(p, p.packed.square_starts), dtype=p.gram_dtype)
    return p.patches.new_empty(size.images, p.n, tiles.ceil_div(p.n, 16) * 16, dtype=p.gram_dtype)


def norm_term(p: Problem, size: BlockSize, dtype: torch.dtype) -> Tensor:
    """Allocate the norm term C `[images, N, N]`, with rows padded to a multiple of 8 elements; packed ones in a row."""
    if p.packed is not None:
        return p.patches.new_empty(size.most(p, p.packed.square_starts), dtype=dtype)
    step = tiles.NORM_TERM_ALIGNMENT
    return p.patches.new_empty(size.images, p.n, tiles.ceil_div(p.n, step) * step, dtype=dtype)[:, :, : p.n]
