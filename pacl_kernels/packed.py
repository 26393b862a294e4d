"""Packed patches `[ΣN, D]`, for backends that take rectangles `[B, N, D]` only: groups of images of similar length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

GROUP_BYTES = 16 * 2**20  # of the padded patches of a group, unless it is one image
PADDING = 8  # at most one row of padding for this many rows, apart from groups of few rows
FEW_ROWS = 512


class Group(NamedTuple):
    """Images that are computed together, as a rectangle of I images of N rows."""

    images: Tensor  # int64 [I]
    rows: Tensor  # int64 [I, N], rows of the packed patches; padding repeats any row
    real: Tensor | None  # bool [I, N], False at padding; None without padding
    places: Tensor  # int64, the real ones among the I N rows

    def gather(self, patches: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return patches `[I, N, D]` of packed ones, and their mask `[I, N]`."""
        if not len(patches):  # all images are empty
            patches = patches.new_zeros(1, patches.shape[1])
            mask = None
        mask = None if mask is None else mask[self.rows]
        if self.real is not None:
            mask = self.real if mask is None else mask & self.real
        return patches[self.rows], mask

    def scatter(self, grad: Tensor, into: Tensor) -> None:
        """Write the gradients `[I, N, D]` of the group to their rows of `[ΣN, D]`."""
        into[self.rows.flatten()[self.places]] = grad.flatten(0, 1)[self.places]


def starts_of(lengths: Tensor) -> Tensor:
    """Return int64 `[B + 1]`, the first row of each image, and the number of rows."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


def groups(lengths: Tensor, row_bytes: int, most: int, device: torch.device) -> Iterator[Group]:
    """Yield groups of at most `most` images that together are all images; `lengths` int64 `[B]` are on the CPU."""
    order = lengths.argsort(stable=True)
    starts = starts_of(lengths)
    sizes = lengths[order].clamp_min(1).tolist()  # an empty image has one row of padding
    first = 0
    while first < len(sizes):
        last, real = first + 1, sizes[first]
        while last < len(sizes) and last - first < most:
            padded = sizes[last] * (last + 1 - first)
            padding = padded - real - sizes[last]
            if padded * row_bytes > GROUP_BYTES or padding * PADDING > max(padded, FEW_ROWS):
                break
            real += sizes[last]
            last += 1
        yield _group(order[first:last], lengths, starts, sizes[last - 1], device)
        first = last


def _group(images: Tensor, lengths: Tensor, starts: Tensor, size: int, device: torch.device) -> Group:
    at = torch.arange(size)
    real = at < lengths[images, None]
    rows = torch.where(real, starts[images, None] + at, 0)
    places = real.flatten().nonzero()[:, 0]
    images, rows, real, places = (to_device(x, device) for x in (images, rows, real, places))
    return Group(images, rows, None if len(places) == rows.numel() else real, places)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy integers or bools from the host without a wait for the device."""
    if device.type != "cuda" or x.is_cuda:
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)
