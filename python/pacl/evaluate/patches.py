"""Patches of a dataset's images with their classes, for the tasks that measure single patches."""

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
from .own_data import segmentation_data
from .segmentation_data import SegmentationData
from .specs import IGNORED


@dataclass(frozen=True, kw_only=True)
class PatchOptions(DatasetOptions):
    """Options of the tasks that measure single patches."""

    dataset: str = "voc20"
    """Name of a dataset of pacl evaluate segmentation; its background class is ignored."""
    short_side: int | None = None
    """Resize images so that their shorter side has this many pixels, by default the tower's size."""

    def read(self) -> SegmentationData:
        """Open the dataset; raises its errors."""
        return segmentation_data(self.dataset, **self.reading)

    def describe(self, data: SegmentationData) -> dict[str, Any]:
        """Return the entries of a result that describe the dataset."""
        classes = {"count": len(data.classes), "sha256": data.class_hash, "background": data.spec.background}
        return {"classes": classes, "images": len(data), "images_of_the_set": data.spec.count[0]}


def labelled_patches(
    data: SegmentationData, segmenter: Segmenter, label: str, group: dist.ProcessGroup | None
) -> Iterator[tuple[int, Dense, Tensor, list[int]]]:
    """Yield (number, patches, classes of the patches [h, w], classes present) of this process's images with a class.

    Background is ignored.
    """
    if segmenter.stride != 1 or segmenter.window is not None:
        raise ValueError(
            f"segmenter: got stride {segmenter.stride} and window {segmenter.window}, expected 1 and None, so that "
            "patches tile the image"
        )
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
                grid = (dense.patches.shape[0], dense.patches.shape[1])
                yield i, dense, patch_truth(torch.from_numpy(labels), grid), present
            shown.step()
