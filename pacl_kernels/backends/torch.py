"""The two fused functions in plain PyTorch, over blocks of images and texts: any device, any dtype, fixed workspace.

Low-precision inputs are widened to float32 a block at a time: a product that is rounded to bfloat16 spoils s / τ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import MIN_NORM, MIN_POOLED_NORM

_BLOCK = 2**21  # elements of one block of scores; about five such blocks are alive at a time


def why_not(device: torch.device | None = None, dtype: torch.dtype | None = None) -> str | None:
    return None


def score_forward(patches, texts, patch_mask, temperature, form, phi, lse) -> None:
    """Write φ and the log-sum-exp over patches of s / τ (0 for an image without a patch), both `[B, K]`."""
    for images, text_blocks in _blocks(patches, texts):
        p, _ = _unit(_masked(patches, patch_mask, images), phi.dtype)
        for columns in text_blocks:
            t, _ = _unit(texts[columns], phi.dtype)
            s, a, lse[images, columns] = _attend(p, t, patch_mask, images, temperature)
            block_phi = (a * s).sum(1)
            if form == "cosine":
                block_phi, _, r = _pool(p, t, a, block_phi)
                block_phi /= r
            phi[images, columns] = block_phi


def score_backward(
    patches, texts, patch_mask, temperature, form, phi, lse, grad_phi, grad_patches, grad_texts, grad_temperature
) -> None:
    """Write the gradients whose buffers are given: `[B, N, D]`, `[K, D]` and `[]`."""
    texts_sum = None if grad_texts is None else texts.new_zeros(texts.shape, dtype=phi.dtype)
    temperature_sum = phi.new_zeros(())
    for images, text_blocks in _blocks(patches, texts):
        p, inv_norm = _unit(_masked(patches, patch_mask, images), phi.dtype)
        patches_sum = torch.zeros_like(p)
        for columns in text_blocks:
            t, _ = _unit(texts[columns], phi.dtype)
            # The attention and its mean are made again, not taken from φ and lse: their rounding, divided by τ, would
            # not cancel against that of s.
            s, a, _ = _attend(p, t, patch_mask, images, temperature)
            g = grad_phi[images, columns]
            u = (a * s).sum(1)
            if form == "dot":
                centred = s - u[:, None]
            else:
                u, q, r = _pool(p, t, a, u)
                # At its floor r is a constant: then the derivative is that of u / r alone.
                moves = r > MIN_POOLED_NORM
                slope = torch.where(moves, u / r.square(), 0.0)
                centred = s - torch.where(moves, 0.0, u)[:, None] - slope[:, None] * q
                g = g / r
                if grad_patches is not None:
                    patches_sum -= _outer_product(a * (g * slope)[:, None], a, p)
            if grad_temperature is not None:
                # Σ (s - u) centred a, and not Σ s dS - Σ φ g, whose two terms are nearly equal.
                temperature_sum -= (((s - u[:, None]) * centred * a).sum(1) * g).sum()
            ds = centred.div_(temperature).add_(1.0).mul_(a).mul_(g[:, None])
            if grad_patches is not None:
                patches_sum += ds @ t
            if texts_sum is not None:
                texts_sum[columns] += ds.flatten(0, 1).T @ p.flatten(0, 1)
        if grad_patches is not None:
            _project_out(patches_sum, p, inv_norm, into=grad_patches[images])
    if grad_texts is not None:
        for rows in _split(len(texts), _BLOCK // max(1, texts.shape[1])):
            t, inv_norm = _unit(texts[rows], phi.dtype)
            _project_out(texts_sum[rows], t, inv_norm, into=grad_texts[rows])
    if grad_temperature is not None:
        grad_temperature.copy_(temperature_sum / temperature / temperature)


def _split(size: int, step: int) -> list[slice]:
    step = max(1, step)
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def _blocks(patches: Tensor, texts: Tensor):
    """Slices of images, each with its slices of texts, such that neither scores nor patches pass `_BLOCK` elements."""
    (b, n, d), k = patches.shape, len(texts)
    columns = _split(k, _BLOCK // n)
    rows_per_image = n * max(d, min(k, _BLOCK // n), 1)
    return [(images, columns) for images in _split(b, _BLOCK // rows_per_image)]


def _masked(patches: Tensor, patch_mask: Tensor | None, images: slice) -> Tensor:
    block = patches[images]
    return block if patch_mask is None else block.masked_fill(~patch_mask[images, :, None], 0.0)


def _unit(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows divided by their norm, and 1 / norm; both 0 for a row without a direction."""
    x = x.to(dtype)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    inv_norm = norm.reciprocal().masked_fill_(norm < MIN_NORM, 0.0)
    return x * inv_norm, inv_norm


def _attend(p: Tensor, t: Tensor, patch_mask: Tensor | None, images: slice, temperature) -> tuple[Tensor, ...]:
    """s `[I, N, K]`, its softmax a over patches (0 where masked), and the log-sum-exp `[I, K]` of s / τ."""
    s = p @ t.T
    z = s / temperature
    if patch_mask is not None:
        z.masked_fill_(~patch_mask[images, :, None], float("-inf"))
    largest = z.amax(1, keepdim=True)
    largest.masked_fill_(largest == float("-inf"), 0.0)  # an image without a patch: every e below is 0
    e = z.sub_(largest).exp_()
    total = e.sum(1, keepdim=True)
    total.masked_fill_(total == 0.0, 1.0)
    return s, e.div_(total), (largest + total.log())[:, 0]


def _pool(p: Tensor, t: Tensor, a: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """u `[I, K]`, q = (p pᵀ) a `[I, N, K]` and the pooled norm r `[I, K]`, multiplied in the cheaper order.

    Where the pooled patches exist, u and r come from them: gradients cancel between u and r.
    """
    n, d = p.shape[1:]
    if n <= d:
        q = (p @ p.mT) @ a
        squared = (a * q).sum(1)
    else:
        pooled = p.mT @ a
        q, squared, u = p @ pooled, pooled.square().sum(1), (pooled * t.T).sum(1)
    return u, q, squared.clamp_min(0).sqrt_().clamp_min(MIN_POOLED_NORM)


def _outer_product(left: Tensor, right: Tensor, p: Tensor) -> Tensor:
    """`(left rightᵀ) p`, multiplied in the cheaper order."""
    n, d = p.shape[1:]
    return (left @ right.mT) @ p if n <= d else left @ (right.mT @ p)


def _project_out(grad_unit: Tensor, unit: Tensor, inv_norm: Tensor, into: Tensor) -> None:
    """`into = ∂L/∂x` from `∂L/∂(x / ‖x‖)`: what points along x does not change its direction."""
    along = torch.linalg.vecdot(grad_unit, unit)[..., None]
    into.copy_((grad_unit - along * unit) * inv_norm)
