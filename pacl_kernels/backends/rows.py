"""Rows of patches and texts of the `torch` backend, and the sums of their gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from ..constants import MIN_NORM
from ..reference import range_factor


class Rows:
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


class TextsSum:
    """Sum `[K, D]` of what reaches the texts from blocks of images."""

    def __init__(self, texts: Tensor, dtype: torch.dtype) -> None:
        self.total = texts.new_zeros(texts.shape, dtype=dtype)

    def add(self, place: slice | Tensor, values: Tensor) -> None:
        """Add `[I, K, D]` to the texts at `place`, a range or lists `[I, K]` with -1 for none."""
        if isinstance(place, slice):
            self.total[place] += values.sum(0)
            return
        values = values.masked_fill((place < 0)[..., None], 0.0)  # 0 times NaN is not 0
        add_rows(self.total, place.clamp_min(0).flatten(), values.flatten(0, 1))

    def add_product(self, place: slice | Tensor, weights: Tensor, p: Tensor) -> None:
        """Add the product of weights `[I, N, K]` and patches `[I, N, D]`."""
        if isinstance(place, slice):
            self.total[place] += weights.flatten(0, 1).T @ p.flatten(0, 1)
        else:
            self.add(place, weights.mT @ p)


def add_rows(sums: Tensor, rows: Tensor, values: Tensor) -> None:
    """Add `values[i]` to `sums[rows[i]]`, in the same order in every run."""
    if sums.is_cuda:  # index_put_ sorts the rows there; scatter_add_ uses atomics
        sums.index_put_((rows,), values, accumulate=True)
    else:
        sums.scatter_add_(0, rows[:, None].expand_as(values), values)
