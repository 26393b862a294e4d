"""The loss of `pacl train --coherence-loss`, which keeps the coherence of the frozen tower's tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def coherence_loss(patches: Tensor, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Return the mean squared difference between the cosines of an image's patches and those of its tokens.

        L = mean over images of 1/N² Σ_ij (cos(x_i, x_j) − cos(t_i, t_j))²

    x are the patch embeddings of an image and t its N tokens. This is the Gram anchoring of DINOv3 (Siméoni et al.
    2025, arXiv 2508.10104, section 4), whose teacher is an earlier state of the model that is trained. Here the teacher
    is the frozen tower. It takes about three float32 matrices `[N, N]` of memory for each image.

    Args:
        patches: `[B, N, D]`, or packed `[sum of N, D]`, not normalised. The gradient goes to them alone.
        tokens: `[B, N, width]`, or packed `[sum of N, width]`, of any float dtype.
        lengths: int64 `[B]` on the CPU, the number of packed patches of each image; None for patches that are not
            packed.

    Returns:
        The loss, 0-D float32, between 0 and 4.
    """
    with torch.autocast(patches.device.type, enabled=False):
        x, t = (F.normalize(rows.float(), dim=-1) for rows in (patches, tokens.detach()))
        if lengths is None:
            return F.mse_loss(x @ x.mT, t @ t.mT)
        images = zip(*(rows.split(lengths.tolist()) for rows in (x, t)), strict=True)
        return torch.stack([F.mse_loss(own @ own.mT, other @ other.mT) for own, other in images]).mean()
