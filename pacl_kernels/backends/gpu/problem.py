"""The tensors of one call."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...pairs import Pairs
from .blocks import Block
from .packed import Packed


class Problem(NamedTuple):
    """The tensors of one call; sizes are B images, N patches, K texts and D dimensions.

    Packed patches are like one image of ΣN patches here, but B is their number of images and N their largest length.
    """

    patches: Tensor  # [B, N, D], or [1, ΣN, D] if packed
    texts: Tensor  # [K, D] for the kernels: in bfloat16 and float32 scaled to norms near 1; of lists [M, images, D]
    raw_texts: Tensor  # [K, D] from the caller
    mask: Tensor | None  # bool [B, N], or [1, ΣN] if packed
    temperature: float | Tensor
    phi: Tensor  # [B, K], float32
    state: Tensor  # [B, K], float32: what the backward needs besides φ, see kernels/__init__.py
    inv_p: Tensor  # [B N] or [ΣN], 1 / norm of the patches, float32
    inv_t: Tensor  # [K], of `texts`; of lists [images, M]
    raw_inv_t: Tensor  # [K], of `raw_texts`
    packed: Packed | None = None

    @property
    def b(self) -> int:
        return self.patches.shape[0] if self.packed is None else len(self.packed.lengths)

    @property
    def n(self) -> int:
        return self.patches.shape[1] if self.packed is None else self.packed.longest

    def rows(self, images: Block) -> slice:
        """Return the rows of a block in `[B N, D]` or `[ΣN, D]`."""
        return slice(images.b0 * self.n, images.b1 * self.n) if self.packed is None else self.packed.rows_of(images)

    def of_images(self, images: Block) -> tuple[Tensor, Tensor | None]:
        """Return patches and mask of a block, in the layout of all of them."""
        of_block = slice(images.b0, images.b1) if self.packed is None else (slice(None), self.rows(images))
        return self.patches[of_block], None if self.mask is None else self.mask[of_block]

    @property
    def d(self) -> int:
        return self.patches.shape[2]

    @property
    def k(self) -> int:
        return len(self.texts)

    @property
    def pairs(self) -> Block:
        """All images and texts."""
        return Block(0, self.b, 0, self.k)

    @property
    def gram_dtype(self) -> torch.dtype:
        """The dtype of the Gram matrices, and of the attention that is multiplied with them.

        For 16-bit patches it is float16: a <= 1 fits, and the rounding error, which is divided by r τ, would be too
        large in bfloat16.
        """
        return torch.float32 if self.patches.dtype == torch.float32 else torch.float16


class Upstream(NamedTuple):
    """Inputs of the backward."""

    grad_phi: Tensor  # [B, K], float32
    range_scale: Tensor | None  # power of two that keeps float16 in range; None for other dtypes
    needs_temperature: bool  # compute the gradient of the temperature


SIGMOID_SUMS = 4  # partial sums of the sigmoid loss: the loss, and the gradients of scale, bias and temperature


class SigmoidPairs(NamedTuple):
    """Inputs of the sigmoid loss and its gradients; without ids and targets text i belongs to image i."""

    scale: float | Tensor  # a tensor is 0-D, float32, on the device
    bias: float | Tensor | None
    given: Pairs  # ids int64 [B] and [K], targets and pair bias float32 [B, K], all contiguous
    grad_pair_bias: Tensor | None  # [B, K], float32, to be written
    needs_temperature: bool  # compute the gradient of the temperature
