"""Backend `torch`: plain PyTorch over blocks of images and texts, for any device and dtype, in a fixed workspace.

16-bit inputs are widened to float32 a block at a time, because rounding s to bfloat16 would spoil s / τ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import Scalar
from ..constants import LARGEST_SCORE, MIN_NORM, MIN_POOLED_NORM
from ..contrastive import loss_backward as loss_backward  # part of a `Backend`
from ..contrastive import loss_forward as loss_forward
from ..contrastive import total
from ..reference import range_factor

# Elements of one block of scores; about five such blocks are alive at a time. A GPU needs larger blocks, else it spends
# its time on launches.
_BLOCK, _GPU_BLOCK = 2**21, 2**24


def why_not(device: torch.device | None = None, dtype: torch.dtype | None = None) -> str | None:
    return None


def compatibility_forward(
    patches: Tensor, texts: Tensor, patch_mask: Tensor | None, temperature: Scalar, form: str,
    phi: Tensor, state: Tensor,
) -> None:  # fmt: skip
    """Write φ `[B, K]`, and 0 to `state`: the backward recomputes the softmax and does not read it.

    For form "max", `state` is the index of the winning patch (-1 for an image without a patch).
    """
    state.zero_()
    for images, text_blocks in _blocks(patches, texts):
        p, *_ = _unit(_masked(patches, patch_mask, images), phi.dtype)
        copy_of = _first_copies(p, patch_mask, images) if form == "max" else None
        for columns in text_blocks:
            t, *_ = _unit(texts[columns], phi.dtype)
            if copy_of is not None:
                phi[images, columns], state[images, columns] = _largest(p, t, patch_mask, images, copy_of)
                continue
            s, a, largest = _attend(p, t, patch_mask, images, temperature)
            if form == "dot":
                phi[images, columns] = (a * s).sum(1) + largest[:, 0]
            else:
                u, _, r = _pool(p, t, a)
                phi[images, columns] = u / r
    if patch_mask is not None:
        phi.masked_fill_(_without_patch(patch_mask), 0.0)  # removes 0 x NaN of texts that are not finite


def compatibility_backward(
    patches: Tensor, texts: Tensor, patch_mask: Tensor | None, temperature: Scalar, form: str,
    phi: Tensor, state: Tensor, grad_phi: Tensor,
    grad_patches: Tensor | None, grad_texts: Tensor | None, grad_temperature: Tensor | None,
) -> None:  # fmt: skip
    """Write the gradients whose buffers are not None: `[B, N, D]`, `[K, D]` and 0-D (0 for form "max")."""
    texts_sum = None if grad_texts is None else texts.new_zeros(texts.shape, dtype=phi.dtype)
    temperature_sum = phi.new_zeros(())
    if patch_mask is not None:
        grad_phi = grad_phi.masked_fill(_without_patch(patch_mask), 0.0)
    for images, text_blocks in _blocks(patches, texts):
        p, inverse, factor = _unit(_masked(patches, patch_mask, images), phi.dtype)
        patches_sum = None if grad_patches is None else p.new_zeros(p.shape)
        for columns in text_blocks:
            t, *_ = _unit(texts[columns], phi.dtype)
            if form == "max":
                _add_largest(p, t, state[images, columns], grad_phi[images, columns], patches_sum, texts_sum, columns)
                continue
            # Recompute the attention and its mean: the rounding of a stored φ, divided by τ, would not cancel against
            # that of s.
            s, a, largest = _attend(p, t, patch_mask, images, temperature)
            g = grad_phi[images, columns]
            if form == "dot":
                u = (a * s).sum(1)
                centred = s - u[:, None]
            else:
                u, pooled, r = _pool(p, t, a)
                # At its floor r is a constant, and only u has a derivative.
                moves = r > MIN_POOLED_NORM
                # One product with the difference, not the difference of two products, which would cancel for φ near 1.
                direction = t - torch.where(moves, u / r.square(), 0.0)[..., None] * pooled
                centred = p @ direction.mT - torch.where(moves, 0.0, u)[:, None]
                # The mean is 0 except for rounding, which 1 / τ magnifies where all s are nearly equal.
                centred -= (a * centred).sum(1, keepdim=True)
                u = u - largest[:, 0]
                g = g / r
                if patches_sum is not None:
                    patches_sum += (a * g[:, None]) @ direction
                if texts_sum is not None:
                    texts_sum[columns] += (g[..., None] * pooled).sum(0)
            if grad_temperature is not None:
                # Σ (s - u) centred a, not Σ s dS - Σ φ g: those two terms are nearly equal.
                temperature_sum -= total(((s - u[:, None]) * centred * a).sum(1) * g)
            ds = centred.mul_(a).div_(temperature)  # in this order, an attention of 0 stays 0 for every τ
            if form == "dot":
                ds.add_(a)
            ds.mul_(g[:, None])
            if patches_sum is not None:
                patches_sum += ds @ t
            if texts_sum is not None:
                texts_sum[columns] += ds.flatten(0, 1).T @ p.flatten(0, 1)
        if grad_patches is not None and patches_sum is not None:
            _project_out(patches_sum, p, inverse, factor, into=grad_patches[images])
    # An attention of 0 may have been multiplied by NaN.
    nothing = None if patch_mask is None else ~patch_mask.any()
    if grad_patches is not None and patch_mask is not None:
        grad_patches.masked_fill_(~patch_mask[..., None], 0.0)
    if grad_texts is not None and texts_sum is not None:
        if nothing is not None:
            texts_sum.masked_fill_(nothing, 0.0)
        for rows in _split(len(texts), _block(texts) // max(1, texts.shape[1])):
            t, inverse, factor = _unit(texts[rows], phi.dtype)
            _project_out(texts_sum[rows], t, inverse, factor, into=grad_texts[rows])
    if grad_temperature is not None:
        grad_temperature.copy_(temperature_sum if form == "max" else temperature_sum / temperature / temperature)
        if nothing is not None:
            grad_temperature.masked_fill_(nothing, 0.0)


def upsample_argmax(
    scores: Tensor, rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor], scale: Scalar,
    labels: Tensor, best: Tensor | None, entropy: Tensor | None,
) -> None:  # fmt: skip
    """Write labels and, where the buffers are not None, best scores and entropies, one band of rows at a time.

    `rows` and `columns`: for each output row (column) the source index before it and the fraction, see
    `ops._positions`.
    """
    (classes, height, width), (size_h, size_w) = scores.shape[1:], labels.shape[1:]
    left, weight = columns[0].long(), columns[1]
    right = (left + (weight > 0)).clamp_max(width - 1)  # a pixel on an element reads only that: the next may be NaN
    step = max(1, _block(labels) // (classes * size_w))
    for image in range(len(scores)):
        for first in range(0, size_h, step):
            band = slice(first, first + step)
            top = rows[0][band].long()
            bottom = (top + (rows[1][band] > 0)).clamp_max(height - 1)
            used, at = torch.cat((top, bottom)).unique_consecutive(return_inverse=True)
            source = scores[image, :, used].to(weight.dtype).clamp(-LARGEST_SCORE, LARGEST_SCORE)
            wide = torch.lerp(source[..., left], source[..., right], weight)
            x = torch.lerp(wide[:, at[: len(top)]], wide[:, at[len(top) :]], rows[1][band, None])
            largest, label = x.max(0)
            labels[image, band] = label.short()
            if best is not None:
                best[image, band] = largest
            if entropy is not None:
                x = x.sub_(largest).mul_(scale).clamp_min_(-100.0)
                e = x.exp()
                total = e.sum(0)
                entropy[image, band] = total.log() - (x * e).sum(0) / total


def _block(x: Tensor) -> int:
    return _GPU_BLOCK if x.is_cuda else _BLOCK


def _split(size: int, step: int) -> list[slice]:
    step = max(1, step)
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def _blocks(patches: Tensor, texts: Tensor) -> list[tuple[slice, list[slice]]]:
    """Return slices of images, each with its slices of texts.

    Patches, scores and pooled patches of a block have at most `_block` elements each, or are of one image and one text.
    """
    (b, n, d), k, block = patches.shape, len(texts), _block(patches)
    columns = _split(k, block // max(n, d))
    widest = max(n * d, max(n, d) * min(k, block // max(n, d)))
    return [(images, columns) for images in _split(b, block // max(1, widest))]


def _masked(patches: Tensor, patch_mask: Tensor | None, images: slice) -> Tensor:
    block = patches[images]
    return block if patch_mask is None else block.masked_fill(~patch_mask[images, :, None], 0.0)


def _without_patch(patch_mask: Tensor) -> Tensor:
    """Return bool `[B, 1]`, True at images whose patches are all masked."""
    return ~patch_mask.any(1, keepdim=True)


def _unit(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows divided by their norm, and two factors whose product is 1 / norm; 0 for a row without a direction.

    There are two factors because the inverse of a norm near the largest number is subnormal.
    """
    x = x.to(dtype)
    factor = range_factor(torch.linalg.vector_norm(x, float("inf"), dim=-1, keepdim=True))
    x = x * factor
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    inverse = norm.reciprocal().masked_fill_(norm / factor < MIN_NORM, 0.0)
    return x.mul_(inverse), inverse, factor


def _attend(p: Tensor, t: Tensor, patch_mask: Tensor | None, images: slice, temperature: Scalar) -> tuple[Tensor, ...]:
    """Return s minus its maximum `[I, N, K]`, its softmax over patches (0 where masked), and that maximum `[I, 1, K]`.

    The maximum is subtracted first because τ divides the rounding error of s.
    """
    s = p @ t.T
    masked = s if patch_mask is None else s.masked_fill(~patch_mask[images, :, None], float("-inf"))
    largest = masked.amax(1, keepdim=True)
    largest.masked_fill_(largest == float("-inf"), 0.0)  # for an image without a patch, where every e below is 0
    e = (masked - largest).div_(temperature).exp_()
    total = e.sum(1, keepdim=True)
    total.masked_fill_(total == 0.0, 1.0)
    return s.sub_(largest), e.div_(total), largest


def _largest(p: Tensor, t: Tensor, patch_mask: Tensor | None, images: slice, copy_of: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest s of each pair and its first index, -1 for an image without a patch."""
    s = p @ t.T
    if patch_mask is not None:
        s.masked_fill_(~patch_mask[images, :, None], float("-inf"))
    phi, index = s.max(1)
    index = copy_of.gather(1, index)
    return phi, index if patch_mask is None else index.masked_fill_(_without_patch(patch_mask[images]), -1)


def _first_copies(p: Tensor, patch_mask: Tensor | None, images: slice) -> Tensor:
    """Return for each patch the index `[I, N]` of the first patch of its image that equals it.

    The scores of copies may differ in their last bits, because a matrix product may add in another order for each row.
    """
    bits = (p + 0.0).view(torch.int32 if p.dtype == torch.float32 else torch.int64)  # -0.0 counts as 0.0
    # Hash weights computed on the device: numbers of a random generator would have to be copied to it.
    weights = torch.arange(1, p.shape[2] + 1, device=p.device) * -0x61C8864680B583EB
    weights = (weights ^ (weights >> 29)) * -0x40A7B892E31B1A47
    key = (bits * weights).sum(-1)  # the same for copies, because integers do not round
    if patch_mask is not None:
        key.masked_fill_(~patch_mask[images], 1)
    places = torch.arange(p.shape[1], device=p.device).expand_as(key)
    key, order = key.sort(dim=1, stable=True)
    starts = torch.ones_like(key, dtype=torch.bool)
    starts[:, 1:] = key[:, 1:] != key[:, :-1]
    first = order.gather(1, torch.where(starts, places, 0).cummax(1).values)
    first = torch.empty_like(order).scatter_(1, order, first)
    same = (p.gather(1, first[..., None].expand_as(p)) == p).all(-1)  # different patches may share a key
    return torch.where(same, first, places)


def _add_largest(
    p: Tensor, t: Tensor, index: Tensor, g: Tensor, patches_sum: Tensor | None, texts_sum: Tensor | None, columns: slice
) -> None:
    """Add `g t` to the row of the winning patch and `g p` to that of the text, which needs no matrix product.

    `g` is 0 where there is no winner.
    """
    g = g[..., None]
    rows = index.clamp_min(0).long() + p.shape[1] * torch.arange(len(p), device=p.device)[:, None]
    if patches_sum is not None:
        _add_rows(patches_sum.view(-1, p.shape[2]), rows.flatten(), (g * t).flatten(0, 1))
    if texts_sum is not None:
        texts_sum[columns] += (g * p.flatten(0, 1)[rows]).sum(0)


def _add_rows(sums: Tensor, rows: Tensor, values: Tensor) -> None:
    """Add `values[i]` to `sums[rows[i]]`, in the same order in every run."""
    if sums.is_cuda:  # index_put_ sorts the rows there; scatter_add_ uses atomics
        sums.index_put_((rows,), values, accumulate=True)
    else:
        sums.scatter_add_(0, rows[:, None].expand_as(values), values)


def _pool(p: Tensor, t: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return u = v · t `[I, K]`, the pooled patches v `[I, K, D]` and their norm r `[I, K]`, floored."""
    pooled = a.mT @ p
    return (pooled * t).sum(-1), pooled, torch.linalg.vector_norm(pooled, dim=-1).clamp_min(MIN_POOLED_NORM)


def _project_out(grad_unit: Tensor, unit: Tensor, inverse: Tensor, factor: Tensor, into: Tensor) -> None:
    """Write ∂L/∂x to `into` from ∂L/∂(x / ‖x‖), without its part along x, which does not change the direction."""
    # Twice: the first projection leaves its own rounding along x, which is all that remains for D = 1.
    for _ in range(2):
        grad_unit = grad_unit - torch.linalg.vecdot(grad_unit, unit)[..., None] * unit
    into.copy_((grad_unit * inverse * factor).masked_fill_((unit == 0).all(-1, keepdim=True), 0.0))
