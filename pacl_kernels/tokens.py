"""Texts of many tokens: φ of each token, pooled over the tokens of its text.

φ `[B, T]` of all T tokens is in memory for a block of images at a time. The backward computes a block again unless φ
and state of all images fit into `KEPT_BYTES`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_sum
from .packed import starts_of, to_device

BLOCK_BYTES = 24 * 2**20  # of φ, state and gradient of the tokens, for a block of images
KEPT_BYTES = 24 * 2**20  # of φ and state of the tokens, for all images
POOL_BYTES = 4 * 2**20  # of each temporary array of a pooling


def kept_pairs(images: int, tokens: int, itemsize: int) -> int:
    """Return the number of elements of the state that the forward leaves: two per image and token, or none."""
    return 2 * images * tokens if 2 * images * tokens * itemsize <= KEPT_BYTES else 0


class Tokens(NamedTuple):
    """The tokens of K texts, one after the other; the padding of texts is left out where the host knows it."""

    rows: Tensor  # [T, D]
    text: Tensor  # int64 [T], the text of each token
    starts: Tensor  # int64 [K + 1]; the tokens of text k are [starts[k], starts[k + 1])
    real: Tensor | None  # bool [T], False at padding that is still there; its rows are 0
    places: Tensor | None  # int64 [T], rows of `texts.flatten(0, 1)`; None: all of them
    way: str  # from φ of tokens to φ of their text, see `fused_pacl_loss`
    scale: float  # of "logsumexp"

    def pool(self, phi: Tensor) -> Tensor:
        """Return φ `[I, K]` of texts from φ `[I, T]` of tokens; 0 for a text without a token."""
        return torch.cat([self._pool(phi[rows]) for rows in self._row_blocks(phi)])

    def spread(self, phi: Tensor, grad: Tensor) -> Tensor:
        """Return the gradient of φ of the tokens `[I, T]` from that of the texts `[I, K]`."""
        out = torch.empty_like(phi)
        for rows in self._row_blocks(phi):
            out[rows] = self._spread(phi[rows], grad[rows])
        return out

    def _pool(self, phi: Tensor) -> Tensor:
        if self.way == "max":
            largest = self._reduce(self._selected(phi, float("-inf")), "max")
            return largest.masked_fill_(self._count() == 0, 0.0)
        if self.way == "logsumexp":
            return (self._log_sum(phi) / self.scale).masked_fill_(self._count() == 0, 0.0).to(phi.dtype)
        total = self._reduce(self._selected(phi, 0.0).double(), "sum")
        return (total / self._count().clamp_min(1) if self.way == "mean" else total).to(phi.dtype)

    def _spread(self, phi: Tensor, grad: Tensor) -> Tensor:
        if self.way == "mean":
            grad = grad / self._count().clamp_min(1)
        out = grad.index_select(1, self.text)
        if self.way == "max":
            out.masked_fill_(~self._is_first_of_largest(phi), 0.0)
        elif self.way == "logsumexp":
            log_sum = self._log_sum(phi).index_select(1, self.text)
            out.mul_((phi * self.scale - log_sum).exp_())
        return self._selected(out, 0.0)

    def _is_first_of_largest(self, phi: Tensor) -> Tensor:
        """Return bool `[I, T]`, True at one token of each text that has one: the first of the largest, or of NaN."""
        phi = self._selected(phi, float("-inf"))
        largest = self._reduce(phi, "max").index_select(1, self.text)
        places = torch.arange(phi.shape[1], device=phi.device).double()  # exact, and no index is as large as their end
        wins = (phi == largest) | phi.isnan()
        if self.real is not None:
            wins &= self.real
        first = self._reduce(torch.where(wins, places, float(phi.shape[1])), "min")
        return places == first.index_select(1, self.text)

    def _log_sum(self, phi: Tensor) -> Tensor:
        """Return log Σ exp(scale φ) over the tokens of each text `[I, K]`; undefined for a text without a token."""
        z = self._selected(phi * self.scale, float("-inf"))
        largest = self._reduce(z, "max")
        shifted = (z - largest.index_select(1, self.text)).exp_()
        return largest + self._reduce(self._selected(shifted, 0.0).double(), "sum").log_().to(phi.dtype)

    def _selected(self, phi: Tensor, other: float) -> Tensor:
        """Return φ with `other` at padding, selected because it may be NaN."""
        return phi if self.real is None else phi.masked_fill(~self.real, other)

    def _count(self) -> Tensor:
        """Return the number of tokens of each text `[K]`."""
        if self.real is None:
            return self.starts.diff()
        return self._reduce(self.real.double()[None], "sum")[0].long()

    def _reduce(self, x: Tensor, reduce: str) -> Tensor:
        """Reduce `[I, T]` over the tokens of each text to `[I, K]`, in one order for any number of threads."""
        starts = self.starts.expand(len(x), -1).contiguous()
        return torch.segment_reduce(x, reduce, offsets=starts, axis=1, unsafe=True)

    def _row_blocks(self, phi: Tensor) -> Iterator[slice]:
        step = max(1, POOL_BYTES // (8 * max(phi.shape[1], 1)))
        return (slice(first, first + step) for first in range(0, len(phi), step))


def tokens_of(texts: Tensor, mask: Tensor | None, lengths: Tensor | None, pool: str, scale: float) -> Tokens:
    """Return the tokens of `texts`, `[K, L, D]` with or without a mask `[K, L]`, or `[T, D]` with lengths `[K]`.

    There may be more tokens than the lengths say: padding at the end, rows of zeros.
    """
    places, real, padding = None, None, False
    if lengths is not None:
        count = None if lengths.is_cuda else int(lengths.sum())
        if count is not None and (count > len(texts) or bool((lengths < 0).any())):
            check_sum("text_lengths", lengths, "texts", len(texts))
        padding = count != len(texts)
        rows, lengths = texts, to_device(lengths, texts.device)
    else:
        k, length = texts.shape[:2]
        rows = texts.reshape(k * length, texts.shape[2])
        lengths = torch.full((k,), length, device=texts.device)
    if mask is not None and mask.device.type == "cpu":
        places = mask.flatten().nonzero()[:, 0]
        rows, lengths = rows[places], mask.sum(1)
    elif mask is not None:  # the number of tokens stays on the device
        real = mask.flatten()
        rows = rows.masked_fill(~real[:, None], 0.0)
    starts = starts_of(lengths)
    text = torch.searchsorted(starts[1:], torch.arange(len(rows), device=texts.device), right=True)
    if padding:
        real = text < len(starts) - 1
        text = text.clamp_max(len(starts) - 2)
    return Tokens(rows, text, starts, real, places, pool, scale)
