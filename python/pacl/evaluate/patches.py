"""Patches of a data set's images with their classes, for the tasks that look at single patches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..processes import place_in, shared_progress
from ..segment.predict import Dense, Segmenter
from .metrics import patch_truth
from .options import DatasetOptions
from .segmentation_data import SegmentationData
from .specs import IGNORED


@dataclass(frozen=True, kw_only=True)
class PatchOptions(DatasetOptions):
    """Options of the tasks that look at single patches."""

    dataset: str = "voc20"
    """A data set of pacl evaluate segmentation; background is no class here."""
    short_side: int | None = None
    """Pixels of the resized image's shorter side; default: the tower's own."""

    def read(self) -> SegmentationData:
        """The data set; see SegmentationData for the errors."""
        return SegmentationData(self.dataset, **self.reading)

    def describe(self, data: SegmentationData) -> dict[str, Any]:
        """The data set as results name it."""
        classes = {"count": len(data.classes), "sha256": data.class_hash, "background": data.spec.background}
        return {"classes": classes, "images": len(data), "images_of_the_set": data.spec.count[0]}


def labelled_patches(
    data: SegmentationData, segmenter: Segmenter, label: str, group: dist.ProcessGroup | None
) -> Iterator[tuple[int, Dense, Tensor, list[int]]]:
    """Of each image of this process that has a class: its number, its patches, their classes [h, w], and which it has.

    Background is ignored.
    """
    if segmenter.stride != 1 or segmenter.window is not None:
        raise ValueError("segmenter: got a stride or a window, expected none: patches are to tile the image")
    rank, world = place_in(group)
    mine = range(rank, len(data), world)
    with shared_progress(label, len(mine), "image", group) as shown:
        for i in mine:
            image, labels = data[i]
            if data.spec.background:
                labels = np.where(labels == 0, IGNORED, labels)
            present = [x for x in np.unique(labels).tolist() if x != IGNORED]
            if present:
                dense = segmenter.dense(image)
                yield i, dense, patch_truth(torch.from_numpy(labels), tuple(dense.patches.shape[:2])), present
            shown.step()
