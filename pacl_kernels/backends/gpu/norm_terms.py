"""Launches of the norm term of the cosine form, in Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from . import launch, tiles
from .blocks import Block
from .layout import attention_strides, by_image, pitch, strides
from .problem import Problem


def write(p: Problem, block: Block, attention: Tensor, norm_factor: Tensor, norm_term: Tensor, precision: str) -> None:
    """Write the norm term C of the block's images; every block of texts but the first adds to it."""
    # The factors exceed the range of float16, and bfloat16 would lose the last three bits of float16 operands.
    wide = p.patches.dtype != torch.bfloat16
    if p.patches.dtype == torch.float16 and torch.version.hip is None:
        precision = "tf32"
    for chosen, programs, tables in by_image(
        p,
        block,
        lambda n: tiles.norm_term_config(n, 4 if wide else 2, p.patches.device),
        lambda n, chosen: tiles.ceil_div(n, chosen.block) ** 2,
    ):
        launch.run(
            launch.kernels().norm_term_kernel,
            programs,
            (attention, norm_factor, p.inv_p, norm_term, block.b0, p.n, block.texts)
            + (*attention_strides(p, attention), pitch(p, norm_term)),
            dict(
                BLOCK=chosen.block,
                BLOCK_K=chosen.block_k,
                A_ALIGN=tiles.alignment(attention),
                C_ALIGN=tiles.NORM_TERM_ALIGNMENT,
                ADD=block.k0 > 0,
                OPERANDS=launch.kernels().DTYPES[torch.float32 if wide else torch.bfloat16],
                PRECISION=precision,
            )
            | tables,
            chosen.warps,
            chosen.stages,
            chosen.registers if p.packed is None else 0,  # with starts of images, that limit would spill
        )


def add_product(p: Problem, block: Block, norm_term: Tensor, raw: Tensor, precision: str) -> None:
    """Add C P / ‖p‖ of each image to `raw` `[rows, D]`. `precision`: of float32 products."""
    wide = norm_term.dtype == torch.float32
    if wide and p.patches.dtype != torch.float32 and torch.version.hip is None:
        precision = "tf32"  # holds patches of 16 bits exactly
    chosen = tiles.NORM_TERM_PRODUCT[norm_term.element_size()]
    block_d = min(chosen.block_d, max(16, tiles.power_of_two(p.d)))
    of_patches, of_mask = strides(p)
    for _, programs, tables in by_image(
        p, block, lambda n: None, lambda n, _: tiles.ceil_div(n, chosen.block_n) * tiles.ceil_div(p.d, block_d)
    ):
        launch.run(
            launch.kernels().norm_term_product_kernel,
            programs,
            (norm_term, p.patches, p.inv_p, p.mask, raw, block.b0, p.n, p.d)
            + (pitch(p, norm_term), *of_patches, *of_mask),
            dict(
                BLOCK_N=chosen.block_n,
                BLOCK_D=block_d,
                BLOCK_M=chosen.step,
                C_ALIGN=tiles.NORM_TERM_ALIGNMENT,
                HAS_MASK=p.mask is not None,
                EVEN_D=p.d % block_d == 0,
                PRECISION=precision,
            )
            | tables,
            chosen.warps,
            chosen.stages,
        )
