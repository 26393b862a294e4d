"""Blocks of images and texts that launches take."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


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
