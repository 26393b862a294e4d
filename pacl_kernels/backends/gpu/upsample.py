"""Best class of each pixel, in Triton."""

from __future__ import annotations

from torch import Tensor

from ...checks import Scalar
from ...constants import LARGEST_SCORE
from . import launch, tiles

_PIXELS = 512  # per program


def upsample_argmax(
    scores: Tensor, rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor], scale: Scalar,
    labels: Tensor, best: Tensor | None, entropy: Tensor | None,
) -> None:  # fmt: skip
    """Write labels, best scores and entropies, see `Backend`; each program takes a block of pixels of one image."""
    with launch.on_device(scores):
        sizes = (*scores.shape[1:], *labels.shape[1:], *scores.stride())
        arguments = (scores, *rows, *columns, scale, labels, best, entropy, *sizes)
        constants = dict(SCALE_IS_TENSOR=isinstance(scale, Tensor), LARGEST=LARGEST_SCORE, BLOCK=_PIXELS)
        programs = len(scores) * tiles.ceil_div(labels[0].numel(), _PIXELS)
        launch.run(launch.kernels().upsample_argmax_kernel, programs, arguments, constants)
