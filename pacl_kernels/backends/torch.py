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
            s, z = _scores(p, t, patch_mask, images, temperature)
            block_lse = z.logsumexp(1).nan_to_num(nan=float("nan"), neginf=0.0, posinf=float("inf"))
            a = z.sub_(block_lse[:, None]).exp_()
            block_phi = torch.linalg.vecdot(a, s, dim=1)
            if form == "cosine":
                block_phi /= _pooled_norm(a, _gram_product(p, a))
            phi[images, columns] = block_phi
            lse[images, columns] = block_lse


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
            s, z = _scores(p, t, patch_mask, images, temperature)
            a = z.sub_(lse[images, None, columns]).exp_()
            g = grad_phi[images, columns]
            block_phi = phi[images, columns]
            if form == "dot":
                centred = s - block_phi[:, None]
            else:
                q = _gram_product(p, a)
                r = _pooled_norm(a, q)
                # At its floor r is a constant: then the derivative is that of u / r alone.
                moves = r > MIN_POOLED_NORM
                slope = torch.where(moves, block_phi / r, 0.0)
                centred = s - torch.where(moves, 0.0, block_phi * r)[:, None] - slope[:, None] * q
                g = g / r
                if grad_patches is not None:
                    patches_sum -= _outer_product(a * (g * slope)[:, None], a, p)
            ds = centred.div_(temperature).add_(1.0).mul_(a).mul_(g[:, None])
            if grad_temperature is not None:
                temperature_sum += (grad_phi[images, columns] * block_phi).sum() - torch.sum(ds * s)
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
        grad_temperature.copy_(temperature_sum / temperature)


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


def _scores(p: Tensor, t: Tensor, patch_mask: Tensor | None, images: slice, temperature) -> tuple[Tensor, Tensor]:
    """s `[I, N, K]`, and s / τ with the masked patches at -inf."""
    s = p @ t.T
    z = s / temperature
    if patch_mask is not None:
        z.masked_fill_(~patch_mask[images, :, None], float("-inf"))
    return s, z


def _gram_product(p: Tensor, a: Tensor) -> Tensor:
    """`(p pᵀ) a`, multiplied in the cheaper order."""
    n, d = p.shape[1:]
    return (p @ p.mT) @ a if n <= d else p @ (p.mT @ a)


def _outer_product(left: Tensor, right: Tensor, p: Tensor) -> Tensor:
    """`(left rightᵀ) p`, multiplied in the cheaper order."""
    n, d = p.shape[1:]
    return (left @ right.mT) @ p if n <= d else left @ (right.mT @ p)


def _pooled_norm(a: Tensor, q: Tensor) -> Tensor:
    return torch.linalg.vecdot(a, q, dim=1).clamp_min(0).sqrt_().clamp_min(MIN_POOLED_NORM)


def _project_out(grad_unit: Tensor, unit: Tensor, inv_norm: Tensor, into: Tensor) -> None:
    """`into = ∂L/∂x` from `∂L/∂(x / ‖x‖)`: what points along x does not change its direction."""
    along = torch.linalg.vecdot(grad_unit, unit)[..., None]
    into.copy_((grad_unit - along * unit) * inv_norm)
