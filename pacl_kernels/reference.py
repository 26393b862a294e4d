"""The formula in plain PyTorch: the specification that every backend is tested against.

It builds the `[B, K, N]` tensor, works in the dtype of its inputs on any device, and lets autograd differentiate it.
Equation numbers are those of Mukhoti et al., CVPR 2023 (arXiv 2212.04994).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

MIN_NORM = 1e-12  # a shorter patch or text has no direction: similarity 0, gradient 0
MIN_POOLED_NORM = 1e-6  # floor of the pooled patch's norm in the cosine form
LARGEST_SCORE = 2.0**120  # of upsample_argmax


def unit(x: Tensor) -> Tensor:
    """`x / ‖x‖` along the last dimension, 0 (and gradient 0) where the norm is below `MIN_NORM`."""
    squared = (x * x).sum(-1, keepdim=True)
    short = squared < MIN_NORM**2  # NaN compares false, so it passes through
    return torch.where(short, 0.0, x * torch.where(short, 1.0, squared).rsqrt())


def first_maximum(scores: Tensor) -> Tensor:
    """Index of the first maximum along the last dimension, of the first NaN where there is one."""
    largest = (scores == scores.amax(-1, keepdim=True)) | scores.isnan()
    places = torch.arange(scores.shape[-1], device=scores.device)
    return torch.where(largest, places, scores.shape[-1]).amin(-1)


def compatibility(
    patches: Tensor,
    texts: Tensor,
    *,
    patch_mask: Tensor | None = None,
    attn_temperature: float | Tensor = 1.0,
    form: str = "dot",
) -> Tensor:
    """φ `[B, K]` of patches `[B, N, D]` and texts `[K, D]` (eq. 2 to 4), `patch_mask` `[B, N]` True at real patches.

    `form="max"`, φ = max s, is the limit of both other forms for τ → 0: the first maximum on ties, which alone has a
    gradient; NaN if any real patch has s = NaN.
    """
    if patch_mask is not None:
        patches = patches.masked_fill(~patch_mask[..., None], 0.0)
    attn_temperature = _scalar(attn_temperature)
    patches, texts = unit(patches), unit(texts)
    scores = torch.einsum("bnd,kd->bkn", patches, texts)
    if form == "max":
        return _largest(scores, patch_mask, attn_temperature)
    attention = scores / attn_temperature
    if patch_mask is None:
        attention = attention.softmax(-1)
    else:
        valid = patch_mask[:, None]
        # An image without a patch would give softmax(-inf, ..) = NaN: let it attend anywhere, then select 0.
        attention = attention.masked_fill(~valid & valid.any(-1, keepdim=True), float("-inf")).softmax(-1)
        attention = attention.masked_fill(~valid, 0.0)
    if form == "dot":
        return (attention * scores).sum(-1)
    pooled = torch.einsum("bkn,bnd->bkd", attention, patches)
    squared = (pooled * pooled).sum(-1)
    norm = squared.clamp_min(MIN_POOLED_NORM**2).sqrt()
    return torch.einsum("bkd,kd->bk", pooled, texts) / norm


def _largest(scores: Tensor, patch_mask: Tensor | None, attn_temperature: float | Tensor) -> Tensor:
    some = torch.ones(scores.shape[0], 1, dtype=torch.bool, device=scores.device)
    if patch_mask is not None:
        some = patch_mask.any(-1, keepdim=True)
        scores = scores.masked_fill(~patch_mask[:, None], float("-inf"))
    phi = scores.gather(-1, first_maximum(scores.detach())[..., None])[..., 0]
    phi = torch.where(some, phi, 0.0)  # an image without a patch
    if isinstance(attn_temperature, Tensor):
        # Selected nowhere: a learnable temperature has gradient 0 and not None, which DDP would wait for.
        phi = torch.where(torch.zeros_like(some), attn_temperature, phi)
    return phi


def _scalar(value: float | Tensor) -> float | Tensor:
    """A tensor 0-D: dimensions of its own would be added to those of what it multiplies."""
    return value.reshape(()) if isinstance(value, Tensor) else value


def contrastive_loss(logits: Tensor, loss: str = "infonce") -> Tensor:
    """Symmetric InfoNCE, or SigLIP's sigmoid loss divided by B, of logits `[B, B]` with the pairs on the diagonal."""
    if loss == "infonce":
        target = torch.arange(logits.shape[0], device=logits.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    sign = 2 * torch.eye(logits.shape[0], dtype=logits.dtype, device=logits.device) - 1
    return -F.logsigmoid(sign * logits).sum() / logits.shape[0]


def pacl_loss(
    patches: Tensor,
    texts: Tensor,
    logit_scale: float | Tensor,
    *,
    patch_mask: Tensor | None = None,
    attn_temperature: float | Tensor = 1.0,
    form: str = "dot",
    loss: str = "infonce",
    logit_bias: float | Tensor | None = None,
) -> Tensor:
    """The loss (0-D) that `pacl_kernels.fused_pacl_loss` computes, with the same arguments."""
    phi = compatibility(patches, texts, patch_mask=patch_mask, attn_temperature=attn_temperature, form=form)
    logits = _scalar(logit_scale) * phi
    if logit_bias is not None:
        logits = logits + _scalar(logit_bias)
    return contrastive_loss(logits, loss)


def upsample_argmax(
    scores: Tensor, size: tuple[int, int], align_corners: bool, logit_scale: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Best score, label (int16) and entropy of the classes' softmax, `[B, H, W]` each, of scores `[B, C, h, w]`."""
    wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
    # An infinite score would be NaN where its weight is 0.
    x = scores.to(wide).clamp(-LARGEST_SCORE, LARGEST_SCORE)
    x = F.interpolate(x, size, mode="bilinear", align_corners=align_corners)
    best, labels = x.max(1)
    entropy = torch.special.entr((_scalar(logit_scale) * x).softmax(1)).sum(1)
    return best, labels.short(), entropy
