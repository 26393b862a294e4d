"""SC-CLIP: tokens of the last block from repaired patches, and from maps that deeper and earlier blocks make alike.

The numbers are those of its code for 12 blocks; `docs/readings.md` has the formula.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .block_parts import attention_of, cosines, finished, part, projections, scaled

NEIGHBOURS, OUTLIERS = 30, 0.05  # of the local outlier factor, and the share of patches that it calls outliers
LEAST = 0.4  # cosines below do not count where tokens are averaged
CLASS = 0.3  # share of the class token that is added
EARLY, MIDDLE, LAST = 4, 9, 10  # of 12 blocks: tokens after so many make maps, and those from EARLY to LAST are added


def after(number: int, count: int) -> int:
    """Return the number of blocks of a tower of `count` that stands for `number` of 12, before the last block."""
    return min(max(1, number * count // 12), count - 1)


class Noted(nn.Module):
    """A block that computes what it always does, and adds its input to a list."""

    def __init__(self, block: nn.Module, inputs: list[Tensor]):
        super().__init__()
        self.block, self.inputs = block, inputs

    def forward(self, x: Tensor, *masks: Any, **more: Any) -> Tensor:
        self.inputs.append(x)
        return self.block(x, *masks, **more)


class Calibrated(nn.Module):
    """The last of `count` blocks.

    inputs: what the blocks before it got, from `after(EARLY, count)` on; a call empties the list. prefix: number of
    tokens before the patches, the class token first if there is one.
    """

    def __init__(
        self, block: nn.Module, inputs: list[Tensor], count: int, grid: tuple[int, int], prefix: int, has_class: bool
    ):
        super().__init__()
        self.block, self.inputs, self.grid, self.prefix, self.has_class = block, inputs, grid, prefix, has_class
        first = after(EARLY, count)
        self.middle, self.end = after(MIDDLE, count) - first, after(LAST, count) - first + 1

    def forward(self, x: Tensor, *unused: Any, rope: Tensor | None = None, **masks: Any) -> Tensor:
        """Return tokens [B, L, C] of tokens [B, L, C]. The class token and registers come first, as they are."""
        streams = [*self.inputs, x]
        self.inputs.clear()
        patches = x[:, self.prefix :]
        odd = outliers(patches)
        similar = cosines(repaired(streams[self.middle][:, self.prefix :], odd, self.grid))
        attention = attention_of(similar, 1.0).to(x)[:, None]
        early = weights(cosines(streams[0][:, self.prefix :])).to(x)
        near = weights(similar).to(x) @ repaired(patches, odd, self.grid)
        out = early @ self._read(torch.cat([x[:, : self.prefix], near], 1), attention, rope)
        total = torch.stack(streams[: self.end]).sum(0)
        return torch.cat([x[:, : self.prefix], out + early @ self._read(total, attention, rope)], 1)

    def _read(self, x: Tensor, attention: Tensor, rope: Tensor | None) -> Tensor:
        """Return the attention's output for the patches of x [B, L, C], with a share of the class token of x."""
        block: Any = self.block
        h = part(block, "norm1", "ln_1")(x)
        q, k, v = (rows[:, :, self.prefix :] for rows in projections(block.attn, h, rope))
        heads = (attention @ v + F.scaled_dot_product_attention(k, k, v)) / 2
        out = scaled(block, 1, finished(block, h[:, self.prefix :], heads))
        return out + CLASS * x[:, :1] if self.has_class else out


def weights(similar: Tensor) -> Tensor:
    """Return cosines [B, N, N] without those below LEAST, each row divided by its sum."""
    kept = similar.masked_fill(similar < LEAST, 0)
    return kept / (kept.sum(-1, keepdim=True) + 1e-6)


def outliers(patches: Tensor) -> Tensor:
    """Return True, bool [B, N], for patches [B, N, C] that lie apart from their neighbours more than 95 % of them.

    The measure is the mean, over a patch's 30 nearest ones, of d / d', where d is the squared distance to the thirtieth
    and d' the same distance from that neighbour. SC-CLIP computes its local outlier factor so.
    """
    patches = patches.to(torch.promote_types(patches.dtype, torch.float32))
    distances = torch.cdist(patches, patches).square()
    count = min(NEIGHBOURS, patches.shape[1] - 1)
    nearest, places = distances.topk(count + 1, largest=False)
    far = nearest[:, :, -1].clamp(min=torch.finfo(nearest.dtype).tiny)  # of equal patches
    around = far[:, None].expand_as(distances).gather(2, places[:, :, 1:])
    factors = far * around.reciprocal().mean(2) if count else torch.zeros_like(far)
    return factors > factors.quantile(1 - OUTLIERS, dim=1, keepdim=True)


def repaired(patches: Tensor, odd: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return patches [B, N, C] of a grid; the odd ones, bool [B, N], become the mean of those around that are not.

    An odd patch without such neighbours stays.
    """
    sound = ~odd[:, None].unflatten(2, grid)
    places = patches.mT.unflatten(2, grid) * sound
    sums, count = (F.avg_pool2d(x, 3, 1, 1, divisor_override=1) for x in (places, sound.to(patches)))
    means = (sums / count.clamp(min=1)).flatten(2).mT
    return torch.where((odd & (count.flatten(1) > 0))[:, :, None], means, patches)
