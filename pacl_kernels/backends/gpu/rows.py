"""Launches over rows of patches or texts: inverse norms, and the projection of gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from . import launch, tiles


def inverse_norms(
    x: Tensor, mask: Tensor | None, scaled: tuple[Tensor, Tensor] | tuple[None, None] = (None, None)
) -> Tensor:
    """Return 1 / ‖x‖ `[B N]` of `x` `[B, N, D]`, float32.

    `scaled`: buffers for the rows times powers of two that bring their norms near 1, and for the 1 / ‖x‖ of these rows.
    """
    rows_count, d = x.shape[0] * x.shape[1], x.shape[2]
    inverse = x.new_empty(rows_count, dtype=torch.float32)
    block_d, rows = _row_blocks(d)
    arguments = (x, mask, inverse, *scaled, rows_count, x.shape[1], d, *x.stride(), *launch.mask_strides(mask))
    constants = dict(ROWS=rows, BLOCK_D=block_d, HAS_MASK=mask is not None)
    launch.run(launch.kernels().inverse_norms_kernel, tiles.ceil_div(rows_count, rows), arguments, constants)
    return inverse


def project_out(
    grad: Tensor,
    x: Tensor,
    inverse: Tensor,
    out: Tensor,
    mask: Tensor | None,
    range_scale: Tensor | None,
    scaled_x: bool = False,
) -> None:
    """Write `grad` `[B N, D]` without its part along each row of `x` `[B, N, D]` to `out`, 0 where masked.

    `inverse`: 1 / ‖x‖ of the rows. `range_scale`: factor of `grad`, to be divided out. `scaled_x`: `grad` is the
    gradient of the rows that `inverse_norms` scaled.
    """
    rows_count, d = grad.shape
    block_d, rows = _row_blocks(d)
    launch.run(
        launch.kernels().project_out_kernel,
        tiles.ceil_div(rows_count, rows),
        (grad, x, inverse, out, mask, range_scale, rows_count, x.shape[1], d)
        + (*x.stride(), *launch.mask_strides(mask)),
        dict(
            ROWS=rows,
            BLOCK_D=block_d,
            HAS_MASK=mask is not None,
            SCALED=range_scale is not None,
            SCALED_X=scaled_x,
        ),
    )


def _row_blocks(d: int) -> tuple[int, int]:
    """Return the step along D and the number of rows of a program."""
    block_d = min(512, max(16, tiles.power_of_two(d)))
    return block_d, 2048 // block_d
