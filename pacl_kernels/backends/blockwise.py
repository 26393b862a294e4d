"""Backend `torch`: plain PyTorch over blocks of images and texts, for any device and dtype, in a fixed workspace.

16-bit inputs are widened to float32 a block at a time, because rounding s to bfloat16 would spoil s / τ.
"""

from __future__ import annotations

from typing import NamedTuple

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
    phi: Tensor, state: Tensor, null_patch: bool = False, normalize: str = "both",
) -> None:  # fmt: skip
    """Write φ `[B, K]`, and 0 to `state`: the backward recomputes the softmax and does not read it.

    For form "max", `state` is the index of the winning patch, or -1 where none wins: for an image without a patch, and
    where all are below the null patch.
    """
    state.zero_()
    keys, values, queries, targets = _kinds(form, normalize)
    for images, text_blocks in _blocks(patches, texts):
        p = _Rows(_masked(patches, patch_mask, images), phi.dtype)
        copy_of = _first_copies(p[keys], patch_mask, images) if form == "max" else None
        for columns in text_blocks:
            t = _Rows(texts[columns], phi.dtype)
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
                phi[images, columns] = (scores.attention * (p[values] @ t[targets].T)).sum(1)
            else:
                phi[images, columns] = scores.mean + scores.largest
    if patch_mask is not None:
        phi.masked_fill_(_without_patch(patch_mask), 0.0)  # removes 0 x NaN of texts that are not finite


def compatibility_backward(
    patches: Tensor, texts: Tensor, patch_mask: Tensor | None, temperature: Scalar, form: str,
    phi: Tensor, state: Tensor, grad_phi: Tensor,
    grad_patches: Tensor | None, grad_texts: Tensor | None, grad_temperature: Tensor | None,
    null_patch: bool = False, normalize: str = "both",
) -> None:  # fmt: skip
    """Write the gradients whose buffers are not None: `[B, N, D]`, `[K, D]` and 0-D (0 for form "max")."""
    keys, values, queries, targets = _kinds(form, normalize)
    texts_sums = {kind: texts.new_zeros(texts.shape, dtype=phi.dtype) for kind in {queries, targets}}
    texts_sums = {} if grad_texts is None else texts_sums
    temperature_sum = phi.new_zeros(())
    if patch_mask is not None:
        grad_phi = grad_phi.masked_fill(_without_patch(patch_mask), 0.0)
    for images, text_blocks in _blocks(patches, texts):
        p = _Rows(_masked(patches, patch_mask, images), phi.dtype)
        sums = {} if grad_patches is None else {kind: p[kind].new_zeros(p[kind].shape) for kind in {keys, values}}
        for columns in text_blocks:
            t = _Rows(texts[columns], phi.dtype)
            g = grad_phi[images, columns]
            if form == "max":
                index = state[images, columns]
                g = g.masked_fill(index < 0, 0.0)
                if sums:
                    _add_largest(p[values], t[targets], index, g, sums[values], None)
                if texts_sums:
                    _add_largest(p[values], t[targets], index, g, None, texts_sums[targets][columns])
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
                    texts_sums[targets][columns] += (g[..., None] * pooled).sum(0)
            elif values != keys:
                centred = p[values] @ t[targets].T
                mean = (a * centred).sum(1)
                centred = centred.sub_(mean[:, None])
                if scores.null is not None:
                    of_null = scores.null * (scores.mean + scores.largest) * mean
                share = a * g[:, None]
                if sums:
                    sums[values] += share @ t[targets]
                if texts_sums:
                    texts_sums[targets][columns] += share.flatten(0, 1).T @ p[values].flatten(0, 1)
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
                texts_sums[queries][columns] += ds.flatten(0, 1).T @ p[keys].flatten(0, 1)
        if grad_patches is not None:
            p.write_gradient(sums, grad_patches[images])
    # An attention of 0 may have been multiplied by NaN.
    nothing = None if patch_mask is None else ~patch_mask.any()
    if grad_patches is not None and patch_mask is not None:
        grad_patches.masked_fill_(~patch_mask[..., None], 0.0)
    if grad_texts is not None:
        for texts_sum in texts_sums.values():
            if nothing is not None:
                texts_sum.masked_fill_(nothing, 0.0)
        for rows in _split(len(texts), _block(texts) // max(1, texts.shape[1])):
            some = {kind: texts_sum[rows] for kind, texts_sum in texts_sums.items()}
            _Rows(texts[rows], phi.dtype).write_gradient(some, grad_texts[rows])
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


def _kinds(form: str, normalize: str) -> tuple[str, str, str, str]:
    """Return which rows of `_Rows` take part: of the patches keys and values, of the texts queries and targets.

    The attention is a softmax of the products of keys and queries, and φ is made of values and targets.
    """
    keys = "unit" if normalize == "both" else "raw"
    values = "raw" if normalize == "none" else "unit"
    return keys, values, keys, "unit" if form == "cosine" else values


class _Rows:
    """Rows of patches or texts in the dtype of φ: as they are ("raw"), and divided by their norm ("unit")."""

    def __init__(self, x: Tensor, dtype: torch.dtype) -> None:
        self._raw = x.to(dtype)
        self._unit: tuple[Tensor, Tensor, Tensor] | None = None

    def __getitem__(self, kind: str) -> Tensor:
        return self._raw if kind == "raw" else self._direction()[0]

    def _direction(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return unit rows, 0 for a row without a direction, and two factors whose product is 1 / norm.

        There are two factors because the inverse of a norm near the largest number is subnormal.
        """
        if self._unit is None:
            factor = range_factor(torch.linalg.vector_norm(self._raw, float("inf"), dim=-1, keepdim=True))
            x = self._raw * factor
            norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
            inverse = norm.reciprocal().masked_fill_(norm / factor < MIN_NORM, 0.0)
            self._unit = x.mul_(inverse), inverse, factor
        return self._unit

    def write_gradient(self, sums: dict[str, Tensor], into: Tensor) -> None:
        """Write ∂L/∂x to `into` from the gradients of raw and unit rows, those that there are.

        The gradient of a unit row loses its part along the row, which does not change the direction.
        """
        if "unit" not in sums:
            into.copy_(sums["raw"])
            return
        unit, inverse, factor = self._direction()
        grad = sums["unit"]
        # Twice: the first projection leaves its own rounding along x, which is all that remains for D = 1.
        for _ in range(2):
            grad = grad - torch.linalg.vecdot(grad, unit)[..., None] * unit
        grad = (grad * inverse * factor).masked_fill_((unit == 0).all(-1, keepdim=True), 0.0)
        into.copy_(grad + sums["raw"] if "raw" in sums else grad)


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
    s = p @ t.T
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
    p: Tensor, t: Tensor, index: Tensor, g: Tensor, patches_sum: Tensor | None, texts_sum: Tensor | None
) -> None:
    """Add `g t` to the row of the winning patch and `g p` to that of the text, which needs no matrix product.

    `g` is 0 where there is no winner.
    """
    g = g[..., None]
    if patches_sum is not None:
        _add_rows(patches_sum.view(-1, p.shape[2]), _winning_rows(p, index).flatten(), (g * t).flatten(0, 1))
    if texts_sum is not None:
        texts_sum += (g * _winners(p, index)).sum(0)


def _winning_rows(p: Tensor, index: Tensor) -> Tensor:
    """Return the rows `[I, K]` of the winners among all patches of the block, the first of an image without one."""
    return index.clamp_min(0).long() + p.shape[1] * torch.arange(len(p), device=p.device)[:, None]


def _winners(p: Tensor, index: Tensor) -> Tensor:
    """Return the winning patches `[I, K, D]`."""
    return p.flatten(0, 1)[_winning_rows(p, index)]


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
