"""Carry patch embeddings from frame to frame of a video, along the patches that resemble each other."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from .predict import Dense

TEMPERATURE = 0.05  # of the cosines between the patches of two frames


class Carry:
    """Mix each patch with those that resemble it in the frame before.

    With patches p of this frame, p' of the one before, its mixture s', and j over the patches around i in that frame:

        c_ij = cos(p_i, p'_j),  w_ij = softmax over j of c_ij / TEMPERATURE,
        a_i = share * max(0, max over j of c_ij),
        s_i = (1 - a_i) p_i + a_i * sum over j of w_ij s'_j.

    Scores are linear in the patches, so they are carried along with them. What resembles nothing keeps its own patch:
    a new object, and everything after a cut. A frame with another grid begins anew.

    Args:
        share: highest weight of the frames before, from 0 (none) to below 1.
        reach: tokens around a patch, in each direction, that it may come from.
    """

    def __init__(self, share: float, reach: int):
        self.share, self.reach = share, reach
        self._before: tuple[Tensor, Tensor] | None = None  # unit patches and mixture, with a margin of `reach` tokens

    def __call__(self, dense: Dense) -> Dense:
        """Return the frame with mixed patches; the next call is for the next frame."""
        if self.share == 0:
            return dense
        unit, mixed = F.normalize(dense.patches, dim=-1), dense.patches
        height, width, _ = unit.shape
        margin = (0, 0) + 4 * (self.reach,)
        if self._before is not None and self._before[0].shape == F.pad(unit, margin).shape:
            before, carried = self._before
            steps = range(2 * self.reach + 1)
            places = [(slice(y, y + height), slice(x, x + width)) for y in steps for x in steps]
            outside = F.pad(unit.new_zeros(height, width), margin[2:], value=1).bool()
            cosines = torch.stack([(unit * before[at]).sum(-1).masked_fill(outside[at], -torch.inf) for at in places])
            weights = (cosines / TEMPERATURE).softmax(0)[..., None]
            found = sum((weight * carried[at] for weight, at in zip(weights, places, strict=True)), torch.zeros(()))
            trust = self.share * cosines.amax(0).clamp(min=0)
            mixed = torch.lerp(mixed, found, trust[..., None])
        self._before = F.pad(unit, margin), F.pad(mixed, margin)
        return dataclasses.replace(dense, patches=mixed)
