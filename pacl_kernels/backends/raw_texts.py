"""The cosine form of rows that are not normalised: the division by the norm of the text.

With v = Σ a p and φ = v · t / (‖v‖ ‖t‖), a kernel that takes rows as they are computes φ ‖t‖.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from ..constants import MIN_NORM


def divide(phi: Tensor, texts: Tensor) -> None:
    """Divide φ `[B, K]` of a kernel by the norms of the texts; it becomes 0 for a text without a direction."""
    phi.mul_(_inverse_norms(texts, phi.dtype))


@contextlib.contextmanager
def gradient(
    texts: Tensor, phi: Tensor, grad_phi: Tensor, grad_texts: Tensor | None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield the gradient of a kernel's φ, and the buffer in which it writes that of the texts.

    Afterwards write the gradient of the texts, which loses Σ g φ t / ‖t‖² over the images.
    """
    inverse = _inverse_norms(texts, phi.dtype)
    buffer = None if grad_texts is None else grad_texts.new_empty(grad_texts.shape, dtype=phi.dtype)
    yield grad_phi * inverse, buffer
    if grad_texts is not None and buffer is not None:
        along = (grad_phi * phi).sum(0) * inverse
        grad_texts.copy_(buffer.sub_(along[:, None] * (texts.to(phi.dtype) * inverse[:, None])))


def _inverse_norms(texts: Tensor, dtype: torch.dtype) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(texts, dim=-1, dtype=torch.float64)
    return norms.reciprocal().masked_fill_(norms < MIN_NORM, 0.0).to(dtype)
