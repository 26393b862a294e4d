"""The best class of each pixel, in Triton."""

from __future__ import annotations

from torch import Tensor

from ...constants import LARGEST_SCORE
from . import launch, tiles

_PIXELS = 512  # of a program


def upsample_argmax(scores, rows, columns, scale, labels, best, entropy) -> None:
    """As `backends/blockwise.py` says; a program takes a block of an image's pixels."""
    with launch.on_device(scores):
        arguments = (scores, *rows, *columns, scale, labels, best, entropy)
        arguments += (*scores.shape[1:], *labels.shape[1:], *scores.stride())
        constants = dict(SCALE_IS_TENSOR=isinstance(scale, Tensor), LARGEST=LARGEST_SCORE, BLOCK=_PIXELS)
        programs = len(scores) * tiles.ceil_div(labels[0].numel(), _PIXELS)
        launch.run(launch.kernels().upsample_argmax_kernel, programs, arguments, constants)
