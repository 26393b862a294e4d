"""`upsample_argmax`: best class of each pixel from coarse class scores, without the upsampled scores."""

from __future__ import annotations

from numbers import Integral
from typing import Any, Literal, overload

import torch
from torch import Tensor

from . import ops, reference
from .autograd import PerSample
from .backends import resolve
from .checks import DTYPES, BackendName, Scalar, check_dense, check_scalar

MAX_CLASSES = 2**15  # labels are int16


@overload
def upsample_argmax(
    scores: Tensor, size: tuple[int, int], *, align_corners: bool = False,
    return_best: Literal[False] = False, return_entropy: Literal[False] = False,
    logit_scale: float | Tensor = 1.0, backend: BackendName = "auto",
) -> Tensor: ...  # fmt: skip


@overload
def upsample_argmax(
    scores: Tensor, size: tuple[int, int], *, align_corners: bool = False,
    return_best: Literal[True], return_entropy: Literal[False] = False,
    logit_scale: float | Tensor = 1.0, backend: BackendName = "auto",
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def upsample_argmax(
    scores: Tensor, size: tuple[int, int], *, align_corners: bool = False,
    return_best: Literal[False] = False, return_entropy: Literal[True],
    logit_scale: float | Tensor = 1.0, backend: BackendName = "auto",
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def upsample_argmax(
    scores: Tensor, size: tuple[int, int], *, align_corners: bool = False,
    return_best: Literal[True], return_entropy: Literal[True],
    logit_scale: float | Tensor = 1.0, backend: BackendName = "auto",
) -> tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip


@overload
def upsample_argmax(
    scores: Tensor, size: tuple[int, int], *, align_corners: bool = False,
    return_best: bool = False, return_entropy: bool = False,
    logit_scale: float | Tensor = 1.0, backend: BackendName = "auto",
) -> Tensor | tuple[Tensor, ...]: ...  # fmt: skip


def upsample_argmax(
    scores: Tensor,
    size: tuple[int, int],
    *,
    align_corners: bool = False,
    return_best: bool = False,
    return_entropy: bool = False,
    logit_scale: float | Tensor = 1.0,
    backend: BackendName = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """Return the best class of each pixel, without the `[B, C, H, W]` tensor.

    It equals, up to rounding,

    ```python
    x = F.interpolate(scores.float(), size, mode="bilinear", align_corners=align_corners)
    best, labels = x.max(1)
    entropy = torch.special.entr((logit_scale * x).softmax(1)).sum(1)
    ```

    Args:
        scores: `[B, C, h, w]`, C at most 32,768; float32, bfloat16, float16 (both widened to float32) or float64, any
            strides. Scores are clamped to ±2¹²⁰, so -inf excludes a class.
        size: H and W, larger or smaller than h and w.
        align_corners: as in `F.interpolate`.
        return_best: also return the score of the best class.
        return_entropy: also return the entropy of the softmax over classes, in nats.
        logit_scale: factor of the scores in that softmax, above 0: a number from 1.2e-38 to 3.4e38, the range of normal
            float32 numbers (of float64 for float64 scores), or a tensor of one element, whose value is not checked.
        backend: `"auto"`, or one of `available_backends()`; the environment variable PACL_BACKEND replaces `"auto"`.

    Returns:
        The labels, int16 `[B, H, W]`; or the tuple of labels, best scores and entropies, without those that were not
        requested. Best scores and entropies are float32 (float64 for float64 scores) `[B, H, W]`. The first of equal
        classes wins. As in `torch.argmax`, the first NaN wins at pixels where it has a weight above 0; best score and
        entropy are then NaN. No result has a gradient. `torch.func.vmap` computes one sample after the other.

    Raises:
        TypeError, ValueError: for a bad argument; the message names it, what came and what was expected.
    """
    h, w = _check(scores, size)
    logit_scale = check_scalar("logit_scale", logit_scale, scores, "scores", positive=True)
    name = resolve(backend, scores.device, scores.dtype)
    scores = scores.detach()
    if name == "reference":
        best, labels, entropy = reference.upsample_argmax(scores, (h, w), align_corners, logit_scale)
        return _answer(labels, best if return_best else None, entropy if return_entropy else None)
    scale = logit_scale.detach() if isinstance(logit_scale, Tensor) else logit_scale
    return _answer(*_Upsample.apply(scores, h, w, align_corners, scale, return_best, return_entropy, name))


class _Upsample(PerSample):
    """Labels, best scores and entropies; the latter two are None unless requested, and none has a gradient."""

    @staticmethod
    def forward(
        scores: Tensor, h: int, w: int, align_corners: bool, logit_scale: Scalar, return_best: bool,
        return_entropy: bool, backend: str,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
        # Not len(scores): torch.export would make it a constant.
        labels = scores.new_empty(scores.shape[0], h, w, dtype=torch.int16)
        best = scores.new_empty(labels.shape, dtype=wide) if return_best else None
        entropy = scores.new_empty(labels.shape, dtype=wide) if return_entropy else None
        ops.upsample_argmax(scores, align_corners, *ops.pair(logit_scale), backend, labels, best, entropy)
        return labels, best, entropy

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        ctx.mark_non_differentiable(*(x for x in output if x is not None))


def _answer(labels: Tensor, best: Tensor | None, entropy: Tensor | None) -> Tensor | tuple[Tensor, ...]:
    asked = tuple(x for x in (labels, best, entropy) if x is not None)
    return asked if len(asked) > 1 else labels


def _check(scores: Any, size: Any) -> tuple[int, int]:
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
    return size  # type: ignore[no-any-return]  # checked above
