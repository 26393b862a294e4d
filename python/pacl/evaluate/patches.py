"""Tests of single patches against a data set's masks: whether words find them, and whether tokens know the class."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from ..segment.predict import Dense, Segmenter
from ..segment.prompts import Texts
from .data import SegmentationData
from .ranks import add_up, gather_rows, place_in, progress
from .specs import IGNORED

SHARE = 0.5  # of its patch that a class must cover
PAIRS = 2**16  # of patches, multiplied at a time


def patch_truth(labels: Tensor, grid: tuple[int, int]) -> Tensor:
    """The class that covers at least half of each patch, else IGNORED: int64 [h, w] of labels [H, W].

    A pixel that lies in two patches counts for both, and one that is IGNORED as covered by no class.
    """
    present = [int(x) for x in labels.unique() if x != IGNORED]
    if not present:
        return torch.full(grid, IGNORED)
    shares = torch.cat([F.adaptive_avg_pool2d((labels == label).double()[None], grid) for label in present])
    share, best = shares.max(0)
    return torch.tensor(present)[best].masked_fill(share < SHARE, IGNORED)


@dataclass
class Alignment:
    """counts: of the patches of each class, int64 [3, K]: all; those that their word found among all classes' words;
    and among those of the classes that the image has. chance: of the third, a fraction. Background is no class.
    """

    counts: Tensor
    chance: float

    def metrics(self) -> dict[str, float]:
        """Accuracy over patches, and its mean over classes, by what the word competes with; fractions."""
        patches = self.counts[0]
        there = patches > 0
        each = self.counts[1:, there].double() / patches[there]
        whole = self.counts[1:].sum(1).double() / patches.sum()
        return {
            "patch_accuracy_all_classes": float(whole[0]),
            "patch_accuracy_image_classes": float(whole[1]),
            "mean_class_accuracy_all_classes": float(each[0].mean()),
            "mean_class_accuracy_image_classes": float(each[1].mean()),
        }


def alignment(
    data: SegmentationData,
    segmenter: Segmenter,
    texts: Texts,
    label: str = "alignment",
    *,
    group: dist.ProcessGroup | None = None,
) -> Alignment:
    """Classify every patch of which one class covers at least half by its most similar text.

    segmenter: of stride 1 and without windows, so that patches tile the image. texts: of data's classes. group: every
    process takes its share of the images, and all return the measures of all. ValueError where no patch counts. Source:
    the patch accuracy of PACL (Mukhoti et al., CVPR 2023); its candidates are not known, hence both.
    """
    first = int(data.spec.background)
    counts = torch.zeros(3, len(data.classes), dtype=torch.int64)
    chance = torch.zeros(len(data), dtype=torch.float64)  # per image: their sum is the same for any number of processes
    for i, dense, truth, present in _patches(data, segmenter, label, group):
        keep = truth != IGNORED
        true = truth[keep]
        scores = dense.scores(texts).cpu()[:, keep]
        found = scores[first:].argmax(0) + first
        among = torch.tensor(present)[scores[present].argmax(0)]
        for row, hit in zip(
            counts, (torch.ones_like(true, dtype=torch.bool), found == true, among == true), strict=True
        ):
            row += true[hit].bincount(minlength=len(row))
        chance[i] = len(true) / len(present)
    add_up(counts, group)
    add_up(chance, group)
    if not counts[0].sum():
        raise ValueError(f"data: no class covers half of a patch in {len(data)} images of {data.spec.name}")
    return Alignment(counts, float(chance.sum()) / int(counts[0].sum()))


@dataclass(frozen=True)
class Coherence:
    """scores: cosines of pairs of patches, float [M]; same: whether both are of one class, bool [M]."""

    scores: Tensor
    same: Tensor

    def curve(self) -> tuple[Tensor, Tensor]:
        """False and true positive rates, float64, rising from 0 to 1; a point for each distinct score."""
        values, place = self.scores.unique(return_inverse=True)
        counts = torch.zeros(2, len(values), dtype=torch.int64)
        for row, chosen in zip(counts, (~self.same, self.same), strict=True):
            row += place[chosen].bincount(minlength=len(values))
        rates = counts.flip(1).cumsum(1).double() / counts.sum(1, keepdim=True)
        return tuple(F.pad(rates, (1, 0)))

    def roc(self, points: int = 101) -> dict[str, list[float]]:
        """The curve at evenly spaced false positive rates, as JSON values."""
        false, true = self.curve()
        at = torch.searchsorted(false, torch.linspace(0, 1, points, dtype=false.dtype), right=True) - 1
        return {"false_positive_rate": false[at].tolist(), "true_positive_rate": true[at].tolist()}

    def auc(self) -> float:
        """The probability that a pair of one class has a higher cosine than another pair; exact, ties count half."""
        false, true = self.curve()
        return float(torch.trapezoid(true, false))


@torch.no_grad()
def coherence(
    data: SegmentationData,
    segmenter: Segmenter,
    *,
    patches: int = 20_000,
    pairs: int = 1_000_000,
    seed: int = 0,
    label: str = "coherence",
    group: dist.ProcessGroup | None = None,
) -> Coherence:
    """Whether patches of one class have more similar tokens than others: no text takes part.

    segmenter: of stride 1 and without windows; its embeddings are compared, tokens with an identity as its embedder.
    patches: so many of the data set's with a class, drawn evenly by `seed`; pairs: so many of theirs, or all where they
    are no more. group: every process takes its share of the images, and all return the same. Background is no class.
    ValueError without pairs of both kinds, or for NaN. Source: the paper's test of vision encoders.
    """
    keys, kept, labels = torch.empty(0, dtype=torch.float64), [], torch.empty(0, dtype=torch.int64)
    for i, dense, truth, _ in _patches(data, segmenter, label, group):
        keep = truth != IGNORED
        # The patches with the lowest random keys are an even sample, whatever their number will be; an image's keys
        # are its own, whichever process has it.
        drawn = torch.from_numpy(np.random.default_rng([seed, i]).random(int(keep.sum())))
        kept, labels = [*kept, dense.patches.cpu()[keep]], torch.cat([labels, truth[keep]])
        keys = torch.cat([keys, drawn])
        if len(keys) > 2 * patches:
            keys, tokens, labels = _lowest(patches, keys, torch.cat(kept), labels)
            kept = [tokens]
    keys, tokens, labels = _lowest(patches, keys, torch.cat(kept) if kept else torch.empty(0, 0), labels)
    if group is not None:
        last = gather_rows(keys[:, None], group)[:, 0].sort().values[:patches][-1:]
        mine = (x[keys <= last] for x in (keys[:, None], tokens, labels[:, None]))
        keys, tokens, labels = (gather_rows(x, group) for x in mine)
        keys, tokens, labels = _lowest(patches, keys[:, 0], tokens, labels[:, 0])
    count, generator = len(keys), torch.Generator().manual_seed(seed)
    if count * (count - 1) // 2 <= pairs:
        one, other = torch.triu_indices(count, count, 1)
    else:
        one = torch.randint(count, (pairs,), generator=generator)
        other = torch.randint(count - 1, (pairs,), generator=generator)
        other += other >= one
    same = labels[one] == labels[other]
    if same.all() or not same.any():
        raise ValueError(f"data: {count} patches of {data.spec.name} make no pairs of one class and of two")
    parts = zip(one.split(PAIRS), other.split(PAIRS), strict=True)
    scores = torch.cat([(tokens[i] * tokens[j]).sum(1) for i, j in parts])
    if scores.isnan().any():
        raise ValueError("tokens: got NaN among their cosines")
    return Coherence(scores, same)


def _patches(
    data: SegmentationData, segmenter: Segmenter, label: str, group: dist.ProcessGroup | None
) -> Iterator[tuple[int, Dense, Tensor, list[int]]]:
    """Of each image of this process that has a class: its number, its patches, their classes [h, w], and which it has.

    Background is ignored.
    """
    if segmenter.stride != 1 or segmenter.window is not None:
        raise ValueError("segmenter: got a stride or a window, expected none: patches are to tile the image")
    rank, world = place_in(group)
    mine = range(rank, len(data), world)
    with progress(label, len(mine), "image", group) as shown:
        for i in mine:
            image, labels = data[i]
            if data.spec.background:
                labels = np.where(labels == 0, IGNORED, labels)
            present = [x for x in np.unique(labels).tolist() if x != IGNORED]
            if present:
                dense = segmenter.dense(image)
                yield i, dense, patch_truth(torch.from_numpy(labels), tuple(dense.patches.shape[:2])), present
            shown.step()


def _lowest(count: int, keys: Tensor, *rows: Tensor) -> list[Tensor]:
    """The `count` lowest keys in their order, and their rows of each."""
    chosen = keys.argsort()[:count]
    return [x[chosen] for x in (keys, *rows)]
