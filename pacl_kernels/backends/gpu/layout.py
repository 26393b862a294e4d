"""Arguments of launches that depend on whether all images have N patches, or are packed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from . import launch
from .blocks import Block
from .packed import ImageLaunch
from .problem import Problem


def by_image(
    p: Problem, block: Block, config_of: Callable[[int], Any], tiles_of: Callable[[int, Any], int]
) -> Iterable[ImageLaunch]:
    """Return launches with a program for each tile of an image, from configuration and tiles of n patches."""
    if p.packed is not None:
        return p.packed.launches(block, config_of, tiles_of)
    config = config_of(p.n)
    return [ImageLaunch(config, block.images * tiles_of(p.n, config), {})]


def by_row(p: Problem, block: Block) -> tuple[int, int, int, dict[str, Any]]:
    """Return `image_begin`, `image_end`, N and tables for kernels that go over the rows of a block."""
    if p.packed is None:
        return block.b0, block.b1, p.n, {}
    rows = p.packed.rows_of(block)
    return rows.start, rows.stop, 1, dict(STARTS=p.packed.on_device, ROW_IMAGE=p.packed.image_of_row)


def strides(p: Problem) -> tuple[tuple[int, ...], tuple[int, int]]:
    """Return the strides of patches (image, patch, dimension) and mask; packed images are images of one patch."""
    of_patches, of_mask = p.patches.stride(), launch.mask_strides(p.mask)
    if p.packed is None:
        return of_patches, of_mask
    return (of_patches[1], of_patches[1], of_patches[2]), (of_mask[1], of_mask[1])


def attention_strides(p: Problem, attention: Tensor) -> tuple[int, int]:
    """Return the strides of images and texts; of packed images each has its own."""
    return (0, 0) if p.packed is not None else (attention.stride(0), attention.stride(1))


def pitch(p: Problem, square: Tensor) -> int:
    """Return the stride of rows of Gram matrices or norm terms; of packed images each has its own."""
    return 0 if p.packed is not None else square.stride(1)
