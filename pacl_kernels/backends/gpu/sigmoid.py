"""Launch of the sigmoid loss in one pass over the pairs, in Triton."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from . import launch, tiles
from .blocks import Block
from .problem import SIGMOID_SUMS, Problem, SigmoidPairs


def tile(p: Problem, needs_temperature: bool) -> tiles.SigmoidTile:
    descriptors = tiles.has_bulk_copies(p.patches.device) and tiles.are_describable(p.patches, p.texts)
    full = p.mask is not None or needs_temperature or True in launch.running_max_variants(p.temperature)
    return tiles.sigmoid_tile(p.patches, p.texts, full or not descriptors, descriptors)


def dot_weights(p: Problem, block: Block, pairs: SigmoidPairs, w: Tensor | None, precision: str) -> Tensor:
    """Write W of the `dot` form and return partial sums, see `order.Launches.sigmoid_dot_weights`."""
    texts = p.texts[block.k0 : block.k1]
    chosen = tile(p, pairs.needs_temperature)
    items = tiles.ceil_div(block.images, chosen.images) * tiles.ceil_div(block.texts, chosen.block_t)
    sums = p.phi.new_empty(items, SIGMOID_SUMS)
    operands: tuple[Any, ...] = (p.patches, p.patches, p.patches, texts)
    descriptors = tiles.has_bulk_copies(p.patches.device) and tiles.are_describable(p.patches, p.texts)
    descriptors &= chosen.images == 1
    if descriptors:
        operands = _descriptors(p.patches, texts, chosen)
    constants = dict(zip(("C0", "C1", "C2"), (*chosen.parts, 0, 0), strict=False)) | dict(
        BLOCK_T=chosen.block_t,
        BLOCK_D=chosen.block_d,
        PAD=chosen.pad,
        IMAGES=chosen.images,
        N_ALIGN=math.gcd(p.n, 16),
        TAU_IS_TENSOR=isinstance(p.temperature, Tensor),
        SCALE_IS_TENSOR=isinstance(pairs.scale, Tensor),
        BIAS_IS_TENSOR=isinstance(pairs.bias, Tensor),
        HAS_MASK=p.mask is not None,
        HAS_W=w is not None,
        NEEDS_TAU=pairs.needs_temperature,
        DESCRIPTORS=descriptors,
        EVEN_D=p.d % chosen.block_d == 0,
        PRECISION=precision,
    )
    for running_max in launch.running_max_variants(p.temperature):
        launch.run(
            launch.kernels().sigmoid_weights_kernel,
            min(launch.programs(p.patches.device, chosen.per_processor), items),
            (*operands, p.mask, p.temperature, pairs.scale, pairs.bias, p.inv_p, p.inv_t[block.k0 :])
            + (*pairs.given, pairs.grad_pair_bias)
            + (w, sums, block.b0, block.b1, block.k0, p.b, p.n, block.texts, p.d)
            + (*p.patches.stride(), *p.texts.stride(), *launch.mask_strides(p.mask))
            + (p.k, 0 if w is None else w.stride(0)),
            constants | dict(RUNNING_MAX=running_max),
            chosen.warps,
            chosen.stages,
            fma=False,
        )
    return sums


def _descriptors(patches: Tensor, texts: Tensor, chosen: tiles.SigmoidTile) -> tuple[Any, ...]:
    """Return descriptors of the patches for each part of a tile, the first one again for those that are not there."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    (b, n, d), k = patches.shape, len(texts)
    of_parts = [
        TensorDescriptor(patches, [b * n, d], [patches.stride(1), 1], [width, chosen.block_d]) for width in chosen.parts
    ]
    of_texts = TensorDescriptor(texts, [k, d], [texts.stride(0), 1], [chosen.block_t, chosen.block_d])
    return (*of_parts, *of_parts[:1] * (3 - len(of_parts)), of_texts)
