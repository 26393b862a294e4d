"""Launches of the gradients of the `max` form, in Triton."""

from __future__ import annotations

from torch import Tensor

from . import launch, tiles
from .blocks import Block
from .layout import by_row, strides
from .problem import Problem


def texts(p: Problem, grad_phi: Tensor, texts_sum: Tensor) -> None:
    """Write the sum over the winning patches of each text, `[K, D]`."""
    constants = tiles.max_texts(p.d)
    launch.run(
        launch.kernels().max_texts_kernel,
        tiles.ceil_div(p.k, constants["TEXTS"]) * tiles.ceil_div(p.d, constants["BLOCK_D"]),
        (p.patches, p.inv_p, p.inv_t, p.state, grad_phi, texts_sum, p.b, p.n, p.k, p.d, *strides(p)[0]),
        constants if p.packed is None else constants | dict(STARTS=p.packed.on_device),
    )


def patches(
    p: Problem, block: Block, grad_phi: Tensor, range_scale: Tensor | None, raw: Tensor, precision: str
) -> None:
    """Write the sum over the texts that each patch won, `[rows, D]`."""
    chosen = (tiles.MAX_PATCHES if p.packed is None else tiles.MAX_PATCHES_PACKED)[p.patches.element_size()]
    block_d = min(chosen.block_d, max(16, tiles.power_of_two(p.d)))
    images, first, n = block.images, block.b0, p.n
    tables: launch.Constants = {}
    if p.packed is not None:
        first, end, _, tables = by_row(p, block)
        images, n = 1, end - first
    launch.run(
        launch.kernels().max_patches_kernel,
        images * tiles.ceil_div(n, chosen.block_n) * tiles.ceil_div(p.d, block_d),
        (p.texts, p.inv_p, p.inv_t, p.state, grad_phi, range_scale, raw) + (first, n, p.k, p.d, *p.texts.stride()),
        dict(
            BLOCK_N=chosen.block_n,
            BLOCK_D=block_d,
            BLOCK_K=chosen.step,
            SCALED=range_scale is not None,
            EVEN_D=p.d % block_d == 0,
            PRECISION=precision,
        )
        | tables,
        chosen.warps,
        chosen.stages,
    )
