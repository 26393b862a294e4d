"""Texts of many tokens: φ of each token, pooled over the tokens of its text.

φ `[B, T]` of all T tokens is in memory for a block of images at a time. The backward computes a block again unless φ
and state of all images fit into `KEPT_BYTES`. With lists of texts an image has tokens of its own; the backward always
computes them again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .checks import check_sum
from .packed import starts_of, to_device

BLOCK_BYTES = 24 * 2**20  # of φ, state and gradient of the tokens, for a block of images
KEPT_BYTES = 24 * 2**20  # of φ and state of the tokens, for all images
POOL_BYTES = 4 * 2**20  # of each temporary array of a pooling


def kept_pairs(images: int, tokens: int, itemsize: int) -> int:
    """Return the number of elements of the state that the forward leaves: two per image and token, or none."""
    return 2 * images * tokens if 2 * images * tokens * itemsize <= KEPT_BYTES else 0


class Tokens(NamedTuple):
    """The tokens of K texts, one after the other; the padding of texts is left out where the host knows it.

    With lists of K texts for each of I images (`listed`), `text`, `starts` and `real` have a row for each image.
    """

    rows: Tensor  # [T, D]
    text: Tensor  # int64 [T], the text of each token
    starts: Tensor  # int64 [K + 1]; the tokens of text k are [starts[k], starts[k + 1])
    real: Tensor | None  # bool [T], False at padding that is still there; its rows are 0
    places: Tensor | None  # int64 [T], rows of `texts.flatten(0, 1)`; None: all of them
    way: str  # from φ of tokens to φ of their text, see `fused_pacl_loss`
    scale: float  # of "logsumexp"
    length: int | None  # L, the most tokens of a text; None for packed texts

    def pool(self, phi: Tensor) -> Tensor:
        """Return φ `[I, K]` of texts from φ `[I, T]` of tokens; 0 for a text without a token."""
        return torch.cat([self._of(rows)._pool(phi[rows]) for rows in self._row_blocks(phi)])

    def spread(self, phi: Tensor, grad: Tensor) -> Tensor:
        """Return the gradient of φ of the tokens `[I, T]` from that of the texts `[I, K]`."""
        out = torch.empty_like(phi)
        for rows in self._row_blocks(phi):
            out[rows] = self._of(rows)._spread(phi[rows], grad[rows])
        return out

    def longest(self, index: Tensor) -> int:
        """Return the number of tokens in the longest list of texts `index` `[I, M]`, or a bound of it on a GPU.

        There the host waits for packed texts, whose lengths it does not have.
        """
        if index.is_cuda and self.length is not None:
            return index.shape[1] * self.length
        return int(self._sizes(index).sum(1).max())

    def listed(self, index: Tensor, count: int) -> tuple[Tokens, Tensor]:
        """Return the tokens of the lists `index` `[I, M]`, -1 for none, and their numbers int64 `[I, count]`.

        `count` is at least that of the longest list; -1 fills the others.
        """
        ends = self._sizes(index).cumsum(1)
        starts = F.pad(ends, (1, 0))
        places = torch.arange(count, device=index.device).expand(len(index), -1).contiguous()
        text = torch.searchsorted(ends, places, right=True)
        real = text < index.shape[1]
        text = text.clamp_max(index.shape[1] - 1)
        before = self.starts[index.clamp_min(0)] - starts[:, :-1]
        number = (before.gather(1, text) + places).masked_fill(~real, -1)
        if self.real is not None:
            real &= self.real[number.clamp_min(0)]
        return self._replace(text=text, starts=starts, real=real), number

    def _sizes(self, index: Tensor) -> Tensor:
        return self.starts.diff()[index.clamp_min(0)].masked_fill(index < 0, 0)

    def _of(self, images: slice) -> Tokens:
        if self.starts.ndim == 1:
            return self
        real = None if self.real is None else self.real[images]
        return self._replace(text=self.text[images], starts=self.starts[images], real=real)

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
        out = self._at_tokens(grad)
        if self.way == "max":
            out.masked_fill_(~self._is_first_of_largest(phi), 0.0)
        elif self.way == "logsumexp":
            log_sum = self._at_tokens(self._log_sum(phi))
            out.mul_((phi * self.scale - log_sum).exp_())
        return self._selected(out, 0.0)

    def _is_first_of_largest(self, phi: Tensor) -> Tensor:
        """Return bool `[I, T]`, True at one token of each text that has one: the first of the largest, or of NaN."""
        phi = self._selected(phi, float("-inf"))
        largest = self._at_tokens(self._reduce(phi, "max"))
        places = torch.arange(phi.shape[1], device=phi.device).double()  # exact, and no index is as large as their end
        wins = (phi == largest) | phi.isnan()
        if self.real is not None:
            wins &= self.real
        first = self._reduce(torch.where(wins, places, float(phi.shape[1])), "min")
        return places == self._at_tokens(first)

    def _log_sum(self, phi: Tensor) -> Tensor:
        """Return log Σ exp(scale φ) over the tokens of each text `[I, K]`; undefined for a text without a token."""
        z = self._selected(phi * self.scale, float("-inf"))
        largest = self._reduce(z, "max")
        shifted = (z - self._at_tokens(largest)).exp_()
        return largest + self._reduce(self._selected(shifted, 0.0).double(), "sum").log_().to(phi.dtype)

    def _selected(self, phi: Tensor, other: float) -> Tensor:
        """Return φ with `other` at padding, selected because it may be NaN."""
        return phi if self.real is None else phi.masked_fill(~self.real, other)

    def _count(self) -> Tensor:
        """Return the number of tokens of each text, `[K]`, `[1, K]` or `[I, K]`."""
        if self.real is None:
            return self.starts.diff()
        real = self.real.double()
        return self._reduce(real if real.ndim == 2 else real[None], "sum").long()

    def _at_tokens(self, x: Tensor) -> Tensor:
        """Return `[I, T]` for each token what `x` `[I, K]` has for its text."""
        return x.index_select(1, self.text) if self.text.ndim == 1 else x.gather(1, self.text)

    def _reduce(self, x: Tensor, reduce: str) -> Tensor:
        """Reduce `[I, T]` over the tokens of each text to `[I, K]`, in one order for any number of threads."""
        starts = self.starts.expand(len(x), -1).contiguous()  # all images have the same, or each its own
        return torch.segment_reduce(x, reduce, offsets=starts, axis=1, unsafe=True)

    def _row_blocks(self, phi: Tensor) -> Iterator[slice]:
        step = max(1, POOL_BYTES // (8 * max(phi.shape[1], 1)))
        return (slice(first, first + step) for first in range(0, len(phi), step))


def tokens_of(texts: Tensor, mask: Tensor | None, lengths: Tensor | None, pool: str, scale: float) -> Tokens:
    """Return the tokens of `texts`, `[K, L, D]` with or without a mask `[K, L]`, or `[T, D]` with lengths `[K]`.

    There may be more tokens than the lengths say: padding at the end, rows of zeros.
    """
    places, real, padding, length = None, None, False, None
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
    return Tokens(rows, text, starts, real, places, pool, scale, length)
