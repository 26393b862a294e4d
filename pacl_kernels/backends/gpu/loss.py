"""Loss of φ `[B, B]` and its gradient, in Triton."""

from __future__ import annotations

from torch import Tensor

from ...checks import Scalar
from . import launch, tiles

_ROW_TILE = dict(ROWS=4, BLOCK=512)
_COLUMN_TILE = dict(ROWS=32, BLOCK=64)


def loss_forward(
    phi: Tensor, scale: Scalar, bias: Scalar | None, loss: str, value: Tensor, statistics: Tensor | None
) -> None:
    """Write the loss of φ `[B, B]`, and for InfoNCE `statistics` `[4, B]`, see `contrastive.loss_forward`."""
    b = len(phi)
    with launch.on_device(phi):
        constants = _loss_constants(scale, bias)
        if loss == "sigmoid":
            sums = phi.new_empty(tiles.ceil_div(b, constants["ROWS"]))
            launch.run(
                launch.kernels().sigmoid_loss_kernel, len(sums), (phi, scale, bias, sums, b), constants, fma=False
            )
            value.copy_(sums.sum() / b)
            return
        assert statistics is not None  # the caller allocates them for InfoNCE
        row_largest, row_log, column_largest, column_log = statistics
        arguments = (phi, scale, bias, row_largest, row_log, b, b, b, 1)
        # No FMA: the logit of the pair, which is subtracted below, must be rounded like these.
        rows = tiles.ceil_div(b, constants["ROWS"])
        launch.run(launch.kernels().shifted_logsumexp_kernel, rows, arguments, constants, fma=False)
        # The neighbours of an element in memory belong to other columns, so a program takes 32 columns.
        arguments, constants = (phi, scale, bias, column_largest, column_log, b, b, 1, b), constants | _COLUMN_TILE
        columns = tiles.ceil_div(b, constants["ROWS"])
        launch.run(launch.kernels().shifted_logsumexp_kernel, columns, arguments, constants, fma=False)
        pair = phi.diagonal() * scale
        if bias is not None:
            pair = pair + bias
        value.copy_(((row_largest - pair + row_log).mean() + (column_largest - pair + column_log).mean()) / 2)


def loss_backward(
    phi: Tensor, scale: Scalar, bias: Scalar | None, loss: str, statistics: Tensor | None, grad_loss: Tensor,
    grad_phi: Tensor, grad_scale: Tensor | None, grad_bias: Tensor | None,
) -> None:  # fmt: skip
    """Write ∂L/∂φ `[B, B]` and, where the buffers are not None, the gradients of logit scale and bias (0-D)."""
    with launch.on_device(phi):
        constants = _loss_constants(scale, bias)
        programs = tiles.ceil_div(len(phi), constants["ROWS"])
        sums = phi.new_empty(2, programs)
        lines = (None,) * 4 if statistics is None else tuple(statistics)
        arguments = (phi, scale, bias, *lines, grad_loss, grad_phi, *sums, len(phi))
        constants |= dict(SIGMOID=loss == "sigmoid")
        launch.run(launch.kernels().loss_backward_kernel, programs, arguments, constants, stages=2, fma=False)
        for grad, parts in zip((grad_scale, grad_bias), sums, strict=True):
            if grad is not None:
                grad.copy_(parts.sum())


def _loss_constants(scale: Scalar, bias: Scalar | None) -> launch.Constants:
    return _ROW_TILE | dict(SCALE_IS_TENSOR=isinstance(scale, Tensor), BIAS_IS_TENSOR=isinstance(bias, Tensor))
