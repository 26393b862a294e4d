"""Packed images of one call: where each one begins, and the tables of tiles that launches read."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...packed import starts_of, to_device
from . import tiles
from .blocks import Block


class Packed:
    """Images of different lengths in the rows of one tensor, one after the other."""

    def __init__(self, lengths: Tensor, device: torch.device) -> None:
        """Take the lengths, int64 `[B]` on the CPU, of patches on `device`."""
        self.lengths = lengths
        self.starts = starts_of(lengths)  # int64 [B + 1]
        self.rows = int(self.starts[-1])
        self.longest = max(1, int(lengths.max()))
        self._device = device
        self.on_device = to_device(self.starts.int(), device)

    @functools.cached_property
    def image_of_row(self) -> Tensor:
        """Return int32 `[ΣN]` on the device."""
        images = torch.arange(len(self.lengths), dtype=torch.int32, device=self._device)
        return images.repeat_interleave(self.on_device.diff(), output_size=self.rows)

    @functools.cached_property
    def square_starts(self) -> Tensor:
        """Return int64 `[B + 1]`: where the matrix of each image begins, N rows of N elements and some of padding."""
        pitch = -(-self.lengths // tiles.PACKED_ALIGNMENT) * tiles.PACKED_ALIGNMENT
        return starts_of(self.lengths * pitch)

    @functools.cached_property
    def squares(self) -> Tensor:
        """Return `square_starts` on the device."""
        return to_device(self.square_starts, self._device)

    def rows_of(self, block: Block) -> slice:
        return slice(int(self.starts[block.b0]), int(self.starts[block.b1]))

    def runs(self, block_p: int, text_tiles: int, programs: int) -> Tensor:
        """Return int32 `[runs, 2]` on the device: first image of each run and the one after it, longest run first.

        A run is walked by one program in tiles of `block_p` rows, the last of which is not full. Long runs waste less
        of it, short ones share the work more evenly. The choice needs the least time if programs take runs as they
        come: all tiles divided by the programs, plus the longest run.
        """
        choices = (self._runs_of(step * block_p) for step in (1, 2, 4, 8, 16, 32))

        def time(ends: Tensor) -> float:
            tiles_of = self._tiles(ends, block_p)
            return int(tiles_of.sum()) * text_tiles / programs + int(tiles_of.max())

        ends = min(choices, key=time)
        order = self._tiles(ends, block_p).argsort(descending=True, stable=True)
        return to_device(torch.stack((ends[:-1], ends[1:]), 1)[order].int(), self._device)

    def _runs_of(self, rows: int) -> Tensor:
        """Return int64 `[runs + 1]`, bounds of runs of images that begin within the same `rows` rows."""
        changes = (self.starts[:-1] // rows).diff().nonzero()[:, 0] + 1
        return torch.cat((torch.tensor([0]), changes, torch.tensor([len(self.lengths)])))

    def _tiles(self, ends: Tensor, block_p: int) -> Tensor:
        return (self.starts[ends].diff() + block_p - 1).div(block_p, rounding_mode="floor").clamp_min_(1)

    def launches(
        self, block: Block, config_of: Callable[[int], Any], tiles_of: Callable[[int, Any], int]
    ) -> Iterator[ImageLaunch]:
        """Yield a launch for the images of each configuration, longest image first; empty images are left out."""
        lengths = self.lengths[block.b0 : block.b1]
        chosen: dict[Any, list[int]] = {}
        for n in lengths.unique().flip(0).tolist():
            if n:
                chosen.setdefault(config_of(n), []).append(n)
        counts = torch.zeros(self.longest + 1, dtype=torch.int64)
        order = lengths.argsort(descending=True, stable=True)
        for config, some in chosen.items():
            counts.zero_()[some] = torch.tensor([tiles_of(n, config) for n in some])
            of_image = counts[lengths[order]]
            images = order.repeat_interleave(of_image)
            first = (of_image.cumsum(0) - of_image).repeat_interleave(of_image)
            table = torch.stack((images, torch.arange(len(images)) - first), 1).int()
            tables = dict(STARTS=self.on_device, SQUARES=self.squares, ITEMS=to_device(table, self._device))
            yield ImageLaunch(config, len(table), tables)


class ImageLaunch(NamedTuple):
    """A launch whose programs have one tile of one image each."""

    config: Any
    programs: int
    tables: dict[str, Any]  # arguments of the kernel by name; none if all images have N patches
