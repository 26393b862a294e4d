"""Zero-shot segmentation from patch embeddings, and its measures, streamed batch by batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from pacl_kernels import upsample_argmax

from .processes import group_device

IGNORE = 255  # the label of pixels that do not count


def class_scores(patches: Tensor, texts: Tensor) -> Tensor:
    """Cosine of every patch [B, N, D] with every class text [K, D]: [B, K, h, w] on the patches' square grid.

    Raw cosines, because they alone compare between classes: a softmax over patches is normalised per text.
    """
    side = round(patches.shape[1] ** 0.5)
    if side * side != patches.shape[1]:
        raise ValueError(f"patches: got {patches.shape[1]} patches, expected a square number")
    scores = F.normalize(texts, dim=-1) @ F.normalize(patches, dim=-1).transpose(1, 2)
    return scores.unflatten(2, (side, side))


def label_map(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Scores [B, K, h, w] enlarged bilinearly to `size` pixels, then the best class of each: int64 [B, H, W]."""
    return upsample_argmax(scores, size).long()


def patch_shares(masks: Tensor, classes: int, grid: tuple[int, int]) -> Tensor:
    """What share of each patch each class covers: float [B, K, h, w] from labels [B, H, W]; IGNORE covers nothing."""
    one_hot = torch.stack([masks == label for label in range(classes)], dim=1).float()
    return F.adaptive_avg_pool2d(one_hot, grid)


def patch_labels(shares: Tensor) -> Tensor:
    """The class that covers at least half of a patch, else IGNORE: int64 [B, h, w]."""
    share, label = shares.max(1)
    return label.masked_fill(share < 0.5, IGNORE)


class ScoreCounts:
    """How well scores on the patches' grid segment: their enlarged maps pixel by pixel, and patch by patch.

    `pixels` and `patches` are confusion matrices of all that was counted.
    """

    def __init__(self, classes: int):
        self.pixels, self.patches = ConfusionMatrix(classes), ConfusionMatrix(classes)

    def update(self, masks: Tensor, scores: Tensor) -> Tensor:
        """Count scores [B, K, h, w] of images with labels [B, H, W]; returns their label maps [B, H, W]."""
        labels = label_map(scores, masks.shape[1:]).cpu()
        self.pixels.update(masks, labels)
        truth = patch_labels(patch_shares(masks, scores.shape[1], scores.shape[2:]))
        self.patches.update(truth, scores.argmax(1).cpu())
        return labels


class ConfusionMatrix:
    """Counts of (true, predicted) label pairs over any number of batches; exact, and K x K whatever the data's size."""

    def __init__(self, classes: int, ignore: int = IGNORE):
        self.counts = torch.zeros(classes, classes, dtype=torch.int64)
        self.ignore = ignore

    def update(self, truth: Tensor, predicted: Tensor) -> None:
        """Count label tensors of equal shape; where `truth` is `ignore` nothing counts. Other labels are below K."""
        classes = len(self.counts)
        keep = truth != self.ignore
        truth, predicted = truth[keep].long(), predicted[keep].long()
        for name, labels in (("truth", truth), ("predicted", predicted)):
            if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
                bad = int(labels.min()) if labels.min() < 0 else int(labels.max())
                raise ValueError(f"{name}: got label {bad}, expected 0 to {classes - 1} or {self.ignore}")
        pairs = torch.bincount(classes * truth + predicted, minlength=classes**2)
        self.counts += pairs.reshape(classes, classes)

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Add up the counts of every process of `group`, whose data are disjoint; None: this process alone."""
        if group is not None:
            counts = self.counts.to(group_device(group))
            dist.all_reduce(counts, group=group)
            self.counts = counts.cpu()

    def recall(self) -> Tensor:
        """Share of each class's pixels that was found, float64 [K]; NaN for a class that is not present."""
        return self.counts.diagonal().double() / self.counts.sum(1)

    def iou(self) -> Tensor:
        """Intersection over union per class, float64 [K]; NaN for a class neither present nor predicted."""
        hit = self.counts.diagonal().double()
        return hit / (self.counts.sum(0) + self.counts.sum(1) - hit)

    def miou(self, labels: Sequence[int] | None = None) -> float:
        """Mean IoU over `labels` (all classes unless given), as a fraction; classes with NaN are left out."""
        iou = self.iou()
        return float(iou[list(labels)].nanmean() if labels is not None else iou.nanmean())

    def accuracy(self, labels: Sequence[int] | None = None) -> float:
        """Share of correct predictions among the truths in `labels` (all unless given); NaN without any."""
        rows = list(labels) if labels is not None else list(range(len(self.counts)))
        return float(self.counts.diagonal()[rows].sum() / self.counts[rows].sum())
