"""The formula in plain PyTorch: the specification for the tests of every backend.

It builds the `[B, K, N]` tensor, computes in the dtype of its inputs on any device, and is differentiated by autograd.
Equation numbers are those of Mukhoti et al., CVPR 2023 (arXiv 2212.04994).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .checks import Scalar
from .constants import LARGEST_SCORE, MIN_NORM, MIN_POOLED_NORM


def unit(x: Tensor) -> Tensor:
    """Return `x / ‖x‖` along the last dimension, 0 (with gradient 0) where the norm is below `MIN_NORM`."""
    factor = range_factor(torch.linalg.vector_norm(x.detach(), float("inf"), dim=-1, keepdim=True))
    x = x * factor
    squared = (x * x).sum(-1, keepdim=True)
    short = squared.sqrt() / factor < MIN_NORM  # False for NaN, which therefore propagates
    return torch.where(short, 0.0, x * torch.where(short, 1.0, squared).rsqrt())


def range_factor(largest: Tensor) -> Tensor:
    """Return powers of two that scale rows with largest elements `largest` so that squares neither overflow nor vanish.

    The factor of a row that is not finite is 1. The inverse norm of a row is that of the scaled row times the factor.
    """
    highest = math.frexp(torch.finfo(largest.dtype).max)[1] - 2  # a larger exponent would make the factor subnormal
    _, exponent = torch.frexp(torch.where(largest.isfinite(), largest, 1.0))
    return torch.ldexp(torch.ones_like(largest), -exponent.clamp(-min(64, highest), highest))


def first_maximum(scores: Tensor) -> Tensor:
    """Return the index of the first maximum along the last dimension, or of the first NaN where there is one."""
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
    patch_lengths: Tensor | None = None,
    text_mask: Tensor | None = None,
    text_lengths: Tensor | None = None,
    text_pool: str | None = None,
    text_pool_scale: float = 1.0,
    null_patch: bool = False,
    normalize: str = "both",
) -> Tensor:
    """Return φ `[B, K]` of patches `[B, N, D]` and texts `[K, D]` (eq. 2 to 4); `patch_mask` `[B, N]`: real patches.

    `form="max"`, φ = max s, is the limit of both other forms for τ → 0. The first maximum wins a tie and alone has a
    gradient. φ is NaN if any real patch has s = NaN.

    With `patch_lengths` `[B]` patches are packed, `[ΣN, D]`. With `text_pool` a text has many tokens, `[K, L, D]` or,
    with `text_lengths` `[K]`, packed `[ΣL, D]`: φ of its tokens is pooled.
    """
    if patch_lengths is not None:
        patches, patch_mask = _unpacked(patches, patch_mask, patch_lengths)
    if text_pool is not None:
        tokens, of_texts = _tokens(texts, text_mask, text_lengths)
        phi = compatibility(
            patches,
            tokens,
            patch_mask=patch_mask,
            attn_temperature=attn_temperature,
            form=form,
            null_patch=null_patch,
            normalize=normalize,
        )
        of_texts_pooled = [_pool(phi[:, own], text_pool, text_pool_scale)[:, None] for own in of_texts]
        return torch.cat([phi[:, :0], *of_texts_pooled], 1)
    attn_temperature = _scalar(attn_temperature)
    some = None if patch_mask is None else patch_mask.any(-1, keepdim=True)  # an image without a patch has φ = 0
    if patch_mask is not None:
        patches = patches.masked_fill(~patch_mask[..., None], 0.0)
    if normalize == "both":
        patches, texts = unit(patches), unit(texts)
    scores = values = torch.einsum("bnd,kd->bkn", patches, texts)
    if normalize == "values":
        patches, texts = unit(patches), unit(texts)
        values = torch.einsum("bnd,kd->bkn", patches, texts)
    elif normalize == "none" and form == "cosine":
        texts = unit(texts)
    if some is not None:  # removes 0 × NaN of texts that are not finite
        scores, values = (x.masked_fill(~some[..., None], 0.0) for x in (scores, values))
    phi = _form(form, patches, texts, scores, values, patch_mask, attn_temperature, null_patch)
    return phi if some is None else phi.masked_fill(~some, 0.0)


def _unpacked(patches: Tensor, patch_mask: Tensor | None, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Return packed patches `[ΣN, D]` as `[B, N, D]`, and their mask `[B, N]`."""
    parts = patches.split(lengths.tolist())
    masks = torch.ones_like(patches[:, 0], dtype=torch.bool) if patch_mask is None else patch_mask
    padded = nn.utils.rnn.pad_sequence([*parts, patches.new_zeros(1, patches.shape[1])], batch_first=True)
    mask = nn.utils.rnn.pad_sequence([*masks.split(lengths.tolist()), masks.new_zeros(1)], batch_first=True)
    return padded[:-1], mask[:-1]


def _tokens(texts: Tensor, mask: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """Return the tokens of all texts `[T, D]`, and the places of those of each text."""
    if lengths is not None:
        return texts, list(torch.arange(len(texts), device=texts.device).split(lengths.tolist()))
    k, length = texts.shape[:2]
    places = torch.arange(k * length, device=texts.device).view(k, length)
    if mask is None:
        return texts.flatten(0, 1), list(places)
    tokens = texts.masked_fill(~mask[..., None], 0.0)
    return tokens.flatten(0, 1), [own[real] for own, real in zip(places, mask, strict=True)]


def _pool(phi: Tensor, pool: str, scale: float) -> Tensor:
    """Return φ `[B]` of a text from φ `[B, L]` of its tokens, 0 for a text without a token."""
    if phi.shape[1] == 0:
        return phi.sum(1)
    if pool == "max":
        return phi.gather(1, first_maximum(phi.detach())[:, None])[:, 0]
    if pool == "logsumexp":
        return (scale * phi).logsumexp(1) / scale
    return phi.mean(1) if pool == "mean" else phi.sum(1)


def _form(
    form: str, patches: Tensor, texts: Tensor, scores: Tensor, values: Tensor, patch_mask: Tensor | None,
    attn_temperature: Scalar, null_patch: bool,
) -> Tensor:  # fmt: skip
    """Return φ `[B, K]`; the rows of images without a patch are undefined.

    `scores` `[B, K, N]` decide where to look, `values` are the products of `patches` and `texts`.
    """
    if form == "max":
        phi = _largest(patches, texts, scores, patch_mask, attn_temperature)
        return phi.clamp_min(0.0) if null_patch else phi
    attention = scores / attn_temperature
    if patch_mask is not None:
        valid = patch_mask[:, None]
        # An image without a patch attends to all: softmax(-inf, ..) would be NaN.
        attention = attention.masked_fill(~valid & valid.any(-1, keepdim=True), float("-inf"))
    if null_patch and form == "dot":  # the cosine divides by the norm of the pooled patch, whose direction is the same
        attention = F.pad(attention, (0, 1)).softmax(-1)[..., :-1]
    else:
        attention = attention.softmax(-1)
    if patch_mask is not None:
        attention = attention.masked_fill(~valid, 0.0)
    if form == "dot":
        return (attention * values).sum(-1)
    pooled = torch.einsum("bkn,bnd->bkd", attention, patches)
    squared = (pooled * pooled).sum(-1)
    norm: Tensor = squared.clamp_min(MIN_POOLED_NORM**2).sqrt()
    return torch.einsum("bkd,kd->bk", pooled, texts) / norm


def _largest(
    patches: Tensor, texts: Tensor, scores: Tensor, patch_mask: Tensor | None, attn_temperature: Scalar
) -> Tensor:
    if patch_mask is not None:
        scores = scores.masked_fill(~patch_mask[:, None], float("-inf"))
    # Recompute the winner's score from its own row: then no other patch has a gradient, not even 0 × NaN.
    winner = patches[torch.arange(patches.shape[0], device=patches.device)[:, None], first_maximum(scores.detach())]
    phi = torch.einsum("bkd,kd->bk", winner, texts)
    if isinstance(attn_temperature, Tensor):
        # Never selected; it ties φ to the temperature so that its gradient is 0, not None (DDP waits for every
        # parameter).
        phi = torch.where(torch.zeros_like(phi, dtype=torch.bool), attn_temperature, phi)
    return phi


def _scalar(value: Scalar) -> Scalar:
    """Return a tensor as 0-D, because its own axes would be added to a product; return a number unchanged."""
    return value.reshape(()) if isinstance(value, Tensor) else value


def contrastive_loss(logits: Tensor, loss: str = "infonce") -> Tensor:
    """Return symmetric InfoNCE, or SigLIP's sigmoid loss over B, of logits `[B, B]` with pairs on the diagonal."""
    if loss == "infonce":
        target = torch.arange(logits.shape[0], device=logits.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    sign = 2 * torch.eye(logits.shape[0], dtype=logits.dtype, device=logits.device) - 1
    return -F.logsigmoid(sign * logits).sum() / logits.shape[0]


def pair_loss(logits: Tensor, targets: Tensor, loss: str = "infonce") -> Tensor:
    """Return the loss (0-D) of logits and targets `[B, K]`; a pair with logit -inf is out.

    A line (row or column) of symmetric InfoNCE has as many positives as its targets say, and is left out of the mean if
    it has none. The sigmoid loss is divided by B.
    """
    out = logits == float("-inf")
    targets = targets.masked_fill(out, 0.0)
    if loss == "sigmoid":
        kept = logits.masked_fill(out, 0.0)  # selected before logsigmoid, whose gradient at -inf is NaN
        terms = targets * F.logsigmoid(kept) + (1 - targets) * F.logsigmoid(-kept)
        return -terms.masked_fill(out, 0.0).sum() / logits.shape[0]
    return (_mean_cross_entropy(logits, targets) + _mean_cross_entropy(logits.T, targets.T)) / 2


def _mean_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    sums = targets.sum(1)
    has_positive = sums > 0
    logits = torch.where(has_positive[:, None], logits, 0.0)  # log_softmax of a row of -inf would be NaN
    logs = logits.log_softmax(1)
    terms = torch.where(targets > 0, targets * logs, 0.0).sum(1) / torch.where(has_positive, sums, 1.0)
    return -terms.sum() / has_positive.sum().clamp_min(1)


def pacl_loss(
    patches: Tensor,
    texts: Tensor,
    logit_scale: float | Tensor,
    *,
    loss: str = "infonce",
    logit_bias: float | Tensor | None = None,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    targets: Tensor | None = None,
    pair_bias: Tensor | None = None,
    text_index: Tensor | None = None,
    **of_phi: Any,
) -> Tensor:
    """Return the loss (0-D) that `pacl_kernels.fused_pacl_loss` computes; the arguments are the same.

    `of_phi`: the arguments of `compatibility`.
    """
    phi = compatibility(patches, texts, **of_phi)
    if text_index is not None:
        bias = torch.zeros_like(text_index, dtype=phi.dtype) if pair_bias is None else pair_bias
        pair_bias = _dense(bias, text_index, phi.shape[1], float("-inf"))
        targets = None if targets is None else _dense(targets, text_index, phi.shape[1], 0.0)
    logits = _scalar(logit_scale) * phi
    if logit_bias is not None:
        logits = logits + _scalar(logit_bias)
    if all(x is None for x in (image_ids, text_ids, targets, pair_bias)):
        return contrastive_loss(logits, loss)
    if targets is None:
        if image_ids is None:
            image_ids = torch.arange(logits.shape[0], device=logits.device)
        if text_ids is None:
            text_ids = image_ids
        targets = ((image_ids[:, None] == text_ids) & (image_ids[:, None] >= 0)).to(logits.dtype)
    return pair_loss(logits if pair_bias is None else logits + pair_bias, targets, loss)


def listed(phi: Tensor, text_index: Tensor) -> Tensor:
    """Return φ `[B, M]` of the listed texts, 0 where the list has none, from φ `[B, K]`."""
    none = (text_index < 0) | (text_index >= phi.shape[1])
    return F.pad(phi, (0, 1)).gather(1, torch.where(none, phi.shape[1], text_index))


def _dense(values: Tensor, text_index: Tensor, count: int, rest: float) -> Tensor:
    """Return values `[B, M]` of listed texts as `[B, count]`, with `rest` elsewhere; a text's first entry counts."""
    place = torch.where((text_index < 0) | (text_index >= count), count, text_index)
    dense = values.new_full((len(values), count + 1), rest)
    for m in reversed(range(values.shape[1])):
        dense = dense.scatter(1, place[:, m : m + 1], values[:, m : m + 1])
    return dense[:, :count]


def upsample_argmax(
    scores: Tensor, size: tuple[int, int], align_corners: bool, logit_scale: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return best scores, labels (int16) and softmax entropies of scores `[B, C, h, w]`, each `[B, H, W]`."""
    wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
    # An infinite score times a weight of 0 would be NaN.
    x = scores.to(wide).clamp(-LARGEST_SCORE, LARGEST_SCORE)
    x = F.interpolate(x, size, mode="bilinear", align_corners=align_corners)
    best, labels = x.max(1)
    entropy = torch.special.entr((_scalar(logit_scale) * x).softmax(1)).sum(1)
    return best, labels.short(), entropy
