"""The tensors of one call, and the blocks of images and texts that its launches take."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...pairs import Pairs


class Block(NamedTuple):
    """Images [b0, b1) and texts [k0, k1)."""

    b0: int
    b1: int
    k0: int
    k1: int

    @property
    def images(self) -> int:
        return self.b1 - self.b0

    @property
    def texts(self) -> int:
        return self.k1 - self.k0

    def by_images(self, step: int) -> Iterator[Block]:
        for b0 in range(self.b0, self.b1, step):
            yield self._replace(b0=b0, b1=min(b0 + step, self.b1))

    def by_texts(self, step: int) -> Iterator[Block]:
        for k0 in range(self.k0, self.k1, step):
            yield self._replace(k0=k0, k1=min(k0 + step, self.k1))


class Problem(NamedTuple):
    """The tensors of one call; sizes are B images, N patches, K texts and D dimensions."""

    patches: Tensor  # [B, N, D]
    texts: Tensor  # [K, D] for the kernels: in bfloat16 and float32 scaled to norms near 1; of lists [M, images, D]
    raw_texts: Tensor  # [K, D] from the caller
    mask: Tensor | None  # bool [B, N]
    temperature: float | Tensor
    phi: Tensor  # [B, K], float32
    state: Tensor  # [B, K], float32: what the backward needs besides φ, see kernels/__init__.py
    inv_p: Tensor  # [B N], 1 / norm of the patches, float32
    inv_t: Tensor  # [K], of `texts`; of lists [images, M]
    raw_inv_t: Tensor  # [K], of `raw_texts`

    @property
    def b(self) -> int:
        return self.patches.shape[0]

    @property
    def n(self) -> int:
        return self.patches.shape[1]

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
