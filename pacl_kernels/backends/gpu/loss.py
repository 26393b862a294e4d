"""The loss of φ `[B, B]` and its gradient, in Triton."""

from __future__ import annotations

from torch import Tensor

from . import launch, tiles

_ROW_TILE = dict(ROWS=4, BLOCK=512)
_COLUMN_TILE = dict(ROWS=32, BLOCK=64)


def loss_forward(phi: Tensor, scale, bias, loss: str, value: Tensor, statistics: Tensor | None) -> None:
    """Write the loss of φ `[B, B]`; for InfoNCE also `statistics` `[4, B]`, maximum and log-sum of rows and columns."""
    b = len(phi)
    with launch.on_device(phi):
        constants = _loss_constants(scale, bias)
        if loss == "sigmoid":
            sums = phi.new_empty(tiles.ceil_div(b, constants["ROWS"]))
            arguments = (phi, scale, bias, sums, b)
            launch.run(launch.kernels().sigmoid_loss_kernel, len(sums), arguments, constants, fma=False)
            value.copy_(sums.sum() / b)
            return
        row_largest, row_log, column_largest, column_log = statistics
        arguments = (phi, scale, bias, row_largest, row_log, b, b, b, 1)
        # The pair's logit is subtracted below: all are rounded alike.
        rows = tiles.ceil_div(b, constants["ROWS"])
        launch.run(launch.kernels().shifted_logsumexp_kernel, rows, arguments, constants, fma=False)
        # A column's neighbours in memory are other columns, so a program takes 32 of them.
        arguments, constants = (phi, scale, bias, column_largest, column_log, b, b, 1, b), constants | _COLUMN_TILE
        columns = tiles.ceil_div(b, constants["ROWS"])
        launch.run(launch.kernels().shifted_logsumexp_kernel, columns, arguments, constants, fma=False)
        pair = phi.diagonal() * scale
        if bias is not None:
            pair = pair + bias
        value.copy_(((row_largest - pair + row_log).mean() + (column_largest - pair + column_log).mean()) / 2)


def loss_backward(phi, scale, bias, loss: str, statistics, grad_loss, grad_phi, grad_scale, grad_bias) -> None:
    """Write ∂L/∂φ `[B, B]` and, 0-D and unless they are None, the gradients of logit scale and bias."""
    with launch.on_device(phi):
        constants = _loss_constants(scale, bias)
        programs = tiles.ceil_div(len(phi), constants["ROWS"])
        sums = phi.new_empty(2, programs)
        statistics = (None,) * 4 if statistics is None else tuple(statistics)
        arguments = (phi, scale, bias, *statistics, grad_loss, grad_phi, *sums, len(phi))
        constants |= dict(SIGMOID=loss == "sigmoid")
        launch.run(launch.kernels().loss_backward_kernel, programs, arguments, constants, stages=2, fma=False)
        for grad, parts in zip((grad_scale, grad_bias), sums, strict=True):
            if grad is not None:
                grad.copy_(parts.sum())


def _loss_constants(scale, bias) -> dict:
    return _ROW_TILE | dict(SCALE_IS_TENSOR=isinstance(scale, Tensor), BIAS_IS_TENSOR=isinstance(bias, Tensor))
