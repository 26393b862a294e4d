"""Backend `torch`: plain PyTorch over blocks of images and texts, for any device and dtype, in a fixed workspace.

16-bit inputs are widened to float32 a block at a time, because rounding s to bfloat16 would spoil s / τ.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import Scalar
from ..constants import LARGEST_SCORE, MIN_POOLED_NORM
from ..contrastive import loss_backward as loss_backward  # part of a `Backend`
from ..contrastive import loss_forward as loss_forward
from ..contrastive import total
from .rows import Rows, TextsSum, add_rows

# Elements of one block of scores; about five such blocks are alive at a time. A GPU needs larger blocks, else it spends
# its time on launches.
_BLOCK, _GPU_BLOCK = 2**21, 2**24


def why_not(device: torch.device | None = None, dtype: torch.dtype | None = None) -> str | None:
    return None


def compatibility_forward(
    patches: Tensor, texts: Tensor, patch_mask: Tensor | None, temperature: Scalar, form: str,
    phi: Tensor, state: Tensor, null_patch: bool = False, normalize: str = "both", text_index: Tensor | None = None,
) -> None:  # fmt: skip
    """Write φ `[B, K]`, and 0 to `state`: the backward recomputes the softmax and does not read it.

    For form "max", `state` is the index of the winning patch, or -1 where none wins: for an image without a patch, and
    where all are below the null patch. With `text_index` int64 `[B, M]` φ and state are those of the listed texts.
    """
    state.zero_()
    keys, values, queries, targets = _kinds(form, normalize)
    for images, text_blocks in _blocks(patches, texts, text_index):
        p = Rows(_masked(patches, patch_mask, images), phi.dtype)
        copy_of = _first_copies(p[keys], patch_mask, images) if form == "max" else None
        for columns in text_blocks:
            t = Rows(_texts_of(texts, text_index, images, columns), phi.dtype)
            if copy_of is not None:
                largest, index = _largest(p[keys], t[queries], patch_mask, images, copy_of)
                if values != keys:
                    largest = (_winners(p[values], index) * t[targets]).sum(-1)
                if null_patch:
                    index = index.masked_fill_(largest < 0.0, -1)
                phi[images, columns] = largest.masked_fill_(index < 0, 0.0) if null_patch else largest
                state[images, columns] = index
                continue
            scores = _attend(p[keys], t[queries], patch_mask, images, temperature, null_patch and form == "dot")
            if form == "cosine":
                u, _, r = _pool(p[values], t[targets], scores.attention)
                phi[images, columns] = u / r
            elif values != keys:
                phi[images, columns] = (scores.attention * (p[values] @ t[targets].mT)).sum(1)
            else:
                phi[images, columns] = scores.mean + scores.largest
    if patch_mask is not None:
        phi.masked_fill_(_without_patch(patch_mask), 0.0)  # removes 0 x NaN of texts that are not finite
    if text_index is not None:
        phi.masked_fill_(text_index < 0, 0.0)


def compatibility_backward(
    patches: Tensor, texts: Tensor, patch_mask: Tensor | None, temperature: Scalar, form: str,
    phi: Tensor, state: Tensor, grad_phi: Tensor,
    grad_patches: Tensor | None, grad_texts: Tensor | None, grad_temperature: Tensor | None,
    null_patch: bool = False, normalize: str = "both", text_index: Tensor | None = None,
) -> None:  # fmt: skip
    """Write the gradients whose buffers are not None: `[B, N, D]`, `[K, D]` and 0-D (0 for form "max").

    With `text_index` int64 `[B, M]` φ, the state and ∂L/∂φ are those of the listed texts.
    """
    keys, values, queries, targets = _kinds(form, normalize)
    kinds = {queries, targets} if grad_texts is not None else set()
    texts_sums = {kind: TextsSum(texts, phi.dtype) for kind in kinds}
    temperature_sum = phi.new_zeros(())
    if patch_mask is not None:
        grad_phi = grad_phi.masked_fill(_without_patch(patch_mask), 0.0)
    if text_index is not None:
        grad_phi = grad_phi.masked_fill(text_index < 0, 0.0)
    for images, text_blocks in _blocks(patches, texts, text_index):
        p = Rows(_masked(patches, patch_mask, images), phi.dtype)
        sums = {} if grad_patches is None else {kind: p[kind].new_zeros(p[kind].shape) for kind in {keys, values}}
        for columns in text_blocks:
            t = Rows(_texts_of(texts, text_index, images, columns), phi.dtype)
            place: slice | Tensor = columns
            if text_index is not None:
                place = text_index[images, columns]
            g = grad_phi[images, columns]
            if form == "max":
                index = state[images, columns]
                g = g.masked_fill(index < 0, 0.0)
                if sums:
                    winning = _winning_rows(p[values], index).flatten()
                    shares = (g[..., None] * t[targets]).flatten(0, 1)
                    add_rows(sums[values].view(-1, patches.shape[2]), winning, shares)
                if texts_sums:
                    texts_sums[targets].add(place, g[..., None] * _winners(p[values], index))
                continue
            # Recompute the attention and its mean: the rounding of a stored φ, divided by τ, would not cancel against
            # that of s.
            scores = _attend(p[keys], t[queries], patch_mask, images, temperature, null_patch and form == "dot")
            a = scores.attention
            of_null: Tensor | None = None  # a (s - mean) (value - φ) of the null patch, whose s and value are 0
            if form == "cosine":
                u, pooled, r = _pool(p[values], t[targets], a)
                # At its floor r is a constant, and only u has a derivative.
                moves = r > MIN_POOLED_NORM
                # One product with the difference, not the difference of two products, which would cancel for φ near 1.
                direction = t[targets] - torch.where(moves, u / r.square(), 0.0)[..., None] * pooled
                centred = p[values] @ direction.mT - torch.where(moves, 0.0, u)[:, None]
                # The mean is 0 except for rounding, which 1 / τ magnifies where all s are nearly equal.
                centred -= (a * centred).sum(1, keepdim=True)
                g = g / r
                if sums:
                    sums[values] += (a * g[:, None]) @ direction
                if texts_sums:
                    texts_sums[targets].add(place, g[..., None] * pooled)
            elif values != keys:
                centred = p[values] @ t[targets].mT
                mean = (a * centred).sum(1)
                centred = centred.sub_(mean[:, None])
                if scores.null is not None:
                    of_null = scores.null * (scores.mean + scores.largest) * mean
                share = a * g[:, None]
                if sums:
                    sums[values] += share @ t[targets]
                if texts_sums:
                    texts_sums[targets].add_product(place, share, p[values])
            else:
                centred = scores.scores - scores.mean[:, None]
                if scores.null is not None:
                    of_null = scores.null * (scores.mean + scores.largest).square()
            if grad_temperature is not None:
                # Σ (s - mean) centred a, not Σ s dS - Σ φ g: those two terms are nearly equal.
                along = ((scores.scores - scores.mean[:, None]) * centred * a).sum(1)
                temperature_sum -= total((along if of_null is None else along + of_null) * g)
            ds = centred.mul_(a).div_(temperature)  # in this order, an attention of 0 stays 0 for every τ
            if form == "dot" and values == keys:
                ds.add_(a)
            ds.mul_(g[:, None])
            if sums:
                sums[keys] += ds @ t[queries]
            if texts_sums:
                texts_sums[queries].add_product(place, ds, p[keys])
        if grad_patches is not None:
            p.write_gradient(sums, grad_patches[images])
    # An attention of 0 may have been multiplied by NaN.
    nothing = None if patch_mask is None else ~patch_mask.any()
    if grad_patches is not None and patch_mask is not None:
        grad_patches.masked_fill_(~patch_mask[..., None], 0.0)
    if grad_texts is not None:
        for texts_sum in texts_sums.values():
            if nothing is not None:
                texts_sum.total.masked_fill_(nothing, 0.0)
        for rows in _split(len(texts), _block(texts) // max(1, texts.shape[1])):
            some = {kind: texts_sum.total[rows] for kind, texts_sum in texts_sums.items()}
            Rows(texts[rows], phi.dtype).write_gradient(some, grad_texts[rows])
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


def _blocks(patches: Tensor, texts: Tensor, text_index: Tensor | None) -> list[tuple[slice, list[slice]]]:
    """Return slices of images, each with its slices of texts, or of their lists.

    Patches, scores and pooled patches of a block have at most `_block` elements each, or are of one image and one text.
    """
    (b, n, d), block = patches.shape, _block(patches)
    k = len(texts) if text_index is None else text_index.shape[1]
    columns = _split(k, block // max(n, d))
    widest = max(n * d, max(n, d) * min(k, block // max(n, d)))
    return [(images, columns) for images in _split(b, block // max(1, widest))]


def _texts_of(texts: Tensor, text_index: Tensor | None, images: slice, columns: slice) -> Tensor:
    """Return the texts of a block: `[K, D]`, or those in the images' lists `[I, M, D]`, zeros where there is none."""
    if text_index is None:
        return texts[columns]
    index = text_index[images, columns]
    return texts[index.clamp_min(0)].masked_fill_((index < 0)[..., None], 0.0)


def _masked(patches: Tensor, patch_mask: Tensor | None, images: slice) -> Tensor:
    block = patches[images]
    return block if patch_mask is None else block.masked_fill(~patch_mask[images, :, None], 0.0)


def _without_patch(patch_mask: Tensor) -> Tensor:
    """Return bool `[B, 1]`, True at images whose patches are all masked."""
    return ~patch_mask.any(1, keepdim=True)


def _kinds(form: str, normalize: str) -> tuple[str, str, str, str]:
    """Return which rows of `Rows` take part: of the patches keys and values, of the texts queries and targets.

    The attention is a softmax of the products of keys and queries, and φ is made of values and targets.
    """
    keys = "unit" if normalize == "both" else "raw"
    values = "raw" if normalize == "none" else "unit"
    return keys, values, keys, "unit" if form == "cosine" else values


class _Scores(NamedTuple):
    """Scores of a block of images and texts, and their softmax over the patches."""

    scores: Tensor  # [I, N, K], s minus the largest
    attention: Tensor  # [I, N, K], 0 where masked
    largest: Tensor  # [I, K], the largest s
    mean: Tensor  # [I, K], Σ a (s - largest)
    null: Tensor | None  # [I, K], the attention of the null patch, if there is one


def _attend(
    p: Tensor, t: Tensor, patch_mask: Tensor | None, images: slice, temperature: Scalar, null_patch: bool
) -> _Scores:
    """Return the scores of patches `[I, N, D]` and texts `[K, D]`.

    The maximum is subtracted first because τ divides the rounding error of s.
    """
    s = p @ t.mT
    masked = s if patch_mask is None else s.masked_fill(~patch_mask[images, :, None], float("-inf"))
    largest = masked.amax(1, keepdim=True)
    largest.masked_fill_(largest == float("-inf"), 0.0)  # for an image without a patch, where every e below is 0
    if null_patch:
        largest.clamp_min_(0.0)
    e = (masked - largest).div_(temperature).exp_()
    total = e.sum(1, keepdim=True)
    null = None
    if null_patch:
        null = (-largest).div_(temperature).exp_()
        total += null
        null = null.div_(total)[:, 0]
    total.masked_fill_(total == 0.0, 1.0)
    s, a, largest = s.sub_(largest), e.div_(total), largest[:, 0]
    mean = (a * s).sum(1)
    return _Scores(s, a, largest, mean if null is None else mean.sub_(null * largest), null)


def _largest(p: Tensor, t: Tensor, patch_mask: Tensor | None, images: slice, copy_of: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest s of each pair and its first index, -1 for an image without a patch."""
    s = p @ t.mT
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


def _winning_rows(p: Tensor, index: Tensor) -> Tensor:
    """Return the rows `[I, K]` of the winners among all patches of the block, the first of an image without one."""
    return index.clamp_min(0).long() + p.shape[1] * torch.arange(len(p), device=p.device)[:, None]


def _winners(p: Tensor, index: Tensor) -> Tensor:
    """Return the winning patches `[I, K, D]`."""
    return p.flatten(0, 1)[_winning_rows(p, index)]


def _pool(p: Tensor, t: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return u = v · t `[I, K]`, the pooled patches v `[I, K, D]` and their norm r `[I, K]`, floored."""
    pooled = a.mT @ p
    return (pooled * t).sum(-1), pooled, torch.linalg.vector_norm(pooled, dim=-1).clamp_min(MIN_POOLED_NORM)
