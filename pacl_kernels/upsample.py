"""`upsample_argmax`: the best class of each pixel from coarse class scores, without the enlarged scores."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor

from . import ops, reference
from .autograd import PerSample
from .backends import resolve
from .checks import DTYPES, check_dense, check_scalar

MAX_CLASSES = 2**15  # labels are int16


def upsample_argmax(
    scores: Tensor,
    size: tuple[int, int],
    *,
    align_corners: bool = False,
    return_best: bool = False,
    return_entropy: bool = False,
    logit_scale: float | Tensor = 1.0,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """The best class of each pixel, without the `[B, C, H, W]` tensor. Equals, up to rounding,

    ```python
    x = F.interpolate(scores.float(), size, mode="bilinear", align_corners=align_corners)
    best, labels = x.max(1)
    entropy = torch.special.entr((logit_scale * x).softmax(1)).sum(1)
    ```

    Args:
        scores: `[B, C, h, w]`, C at most 32,768; float32, bfloat16, float16 (both widened to float32) or float64, any
            strides. What is beyond ±2¹²⁰ counts as that: -inf excludes a class.
        size: H and W, larger or smaller than h and w.
        align_corners: as in `F.interpolate`.
        return_best: also the best class's score.
        return_entropy: also the entropy, in nats, of the classes' softmax.
        logit_scale: factor of the scores in that softmax, above 0: a number from 1.2e-38 to 3.4e38, the normal ones of
            float32 (for float64 scores of float64), or a tensor of one element, whose value is not checked.
        backend: `"auto"`, or one of `available_backends()`; the environment variable PACL_BACKEND replaces `"auto"`.

    Returns:
        labels, int16 `[B, H, W]`, alone or in a tuple with what was asked for, in that order, float32 (float64 for
        float64 scores) `[B, H, W]`. The first of equal classes wins. The first NaN wins, as in `torch.argmax`, at
        pixels where it has a weight above 0; best score and entropy are then NaN. No gradients. `torch.func.vmap`
        computes one sample after the other.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
    """
    h, w = _check(scores, size)
    logit_scale = check_scalar("logit_scale", logit_scale, scores, "scores", positive=True)
    backend = resolve(backend, scores.device, scores.dtype)
    scores = scores.detach()
    if backend == "reference":
        best, labels, entropy = reference.upsample_argmax(scores, (h, w), align_corners, logit_scale)
        return _answer(labels, best if return_best else None, entropy if return_entropy else None)
    scale = logit_scale.detach() if isinstance(logit_scale, Tensor) else logit_scale
    return _answer(*_Upsample.apply(scores, h, w, align_corners, scale, return_best, return_entropy, backend))


class _Upsample(PerSample):
    """Labels, best score and entropy, the latter two None where they are not asked for; none has a gradient."""

    @staticmethod
    def forward(scores, h, w, align_corners, logit_scale, return_best, return_entropy, backend):
        wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
        # Not len(scores), which torch.export would take for a constant.
        labels = scores.new_empty(scores.shape[0], h, w, dtype=torch.int16)
        best = scores.new_empty(labels.shape, dtype=wide) if return_best else None
        entropy = scores.new_empty(labels.shape, dtype=wide) if return_entropy else None
        ops.upsample_argmax(scores, align_corners, *ops.pair(logit_scale), backend, labels, best, entropy)
        return labels, best, entropy

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*(x for x in output if x is not None))


def _answer(labels, best, entropy):
    asked = tuple(x for x in (labels, best, entropy) if x is not None)
    return asked if len(asked) > 1 else labels


def _check(scores, size) -> tuple[int, int]:
    if not isinstance(scores, Tensor):
        raise TypeError(f"scores is a {type(scores).__name__}, expected a tensor of shape [B, C, h, w]")
    check_dense("scores", scores)
    if scores.dtype not in DTYPES:
        raise TypeError(f"scores is {scores.dtype}, expected float32, bfloat16, float16 or float64")
    if scores.ndim != 4 or 0 in scores.shape[1:]:
        raise ValueError(f"scores has shape {list(scores.shape)}, expected [B, C, h, w] with C, h, w of at least 1")
    if scores.shape[1] > MAX_CLASSES:
        raise ValueError(f"scores has C = {scores.shape[1]} classes, expected at most {MAX_CLASSES} (labels are int16)")
    is_pair = isinstance(size, (tuple, list)) and len(size) == 2
    if not is_pair or not all(isinstance(x, (Integral, torch.SymInt)) and not isinstance(x, bool) for x in size):
        raise TypeError(f"size is {size!r}, expected two integers (H, W)")
    if min(size) < 1:
        raise ValueError(f"size is {tuple(size)}, expected H and W of at least 1")
    return size
