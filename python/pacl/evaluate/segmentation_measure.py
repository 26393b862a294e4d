"""IoU and accuracy of a predictor on a data set, by a protocol, and the predictor that a Segmenter makes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn

from ..formats import percent
from ..processes import add_up, place_in, shared_progress
from ..segment.predict import Segmenter
from ..segment.prompts import Texts, class_texts, templates
from ..towers import Towers
from .metrics import ConfusionMatrix, chance_miou
from .segmentation_data import SegmentationData
from .specs import IGNORED, Protocol

# From an RGB image and the labels that compete to a label per pixel of it, integers [H, W].
Predictor = Callable[[Image.Image, Sequence[int]], "Tensor | np.ndarray"]


@dataclass
class Measured:
    """matrix: of the whole data set. scores: mean IoU of each image over the classes it has, float64 [images], NaN
    where no pixel counts. metrics: `aAcc`, `mIoU`, `mAcc`, and `IoU` and `Acc` per class, in percent of two decimals,
    None for a class that is not there. chance: the mIoU of labels drawn at random. warnings: what looks wrong.
    """

    matrix: ConfusionMatrix
    scores: Tensor
    metrics: dict
    chance: float
    warnings: list[str]


def evaluate_segmentation(
    data: SegmentationData, predict: Predictor, protocol: Protocol, *, group: dist.ProcessGroup | None = None
) -> Measured:
    """Measure `predict` on `data`. With `group` every process takes its share and all return the measures of all.

    ValueError for a threshold on a data set without background, and for labels that did not compete.
    """
    check_background(data, protocol)
    rank, world = place_in(group)
    classes = len(data.classes)
    matrix = ConfusionMatrix(classes, ignore=IGNORED)
    per_image = torch.zeros(2, len(data), dtype=torch.float64)  # score, and what chance makes
    mine = range(rank, len(data), world)
    with shared_progress(data.spec.name, len(mine), "image", group) as shown:
        for i in mine:
            image, truth = data[i]
            candidates, truth = competitors(data, truth, protocol)
            one = ConfusionMatrix(classes, ignore=IGNORED)
            if candidates:
                labels = torch.as_tensor(predict(image, candidates)).cpu()
                if tuple(labels.shape) != truth.shape:
                    raise ValueError(f"predict: got labels {tuple(labels.shape)}, expected {truth.shape}")
                stray = set(labels.unique().tolist()) - set(candidates)
                if stray:
                    raise ValueError(f"predict: got label {min(stray)}, which did not compete")
                one.update(torch.from_numpy(truth), labels)
            present = one.counts.sum(1).nonzero()[:, 0].tolist()
            per_image[0, i] = one.miou(present) if present else math.nan
            per_image[1, i] = chance_miou(one.counts.sum(1), present, len(present)) if present else math.nan
            matrix.counts += one.counts
            shown.step()
    matrix.all_reduce(group)
    add_up(per_image, group)
    return _measures(data, protocol, matrix, per_image)


def competitors(data: SegmentationData, truth: np.ndarray, protocol: Protocol) -> tuple[list[int], np.ndarray]:
    """The labels that compete for an image, and its truth as the protocol counts it."""
    if protocol.candidates == "all":
        return list(range(len(data.classes))), truth
    if protocol.foreground and data.spec.background:
        truth = np.where(truth == 0, IGNORED, truth)
    return [x for x in np.unique(truth).tolist() if x != IGNORED], truth


def check_background(data: SegmentationData, protocol: Protocol) -> None:
    """ValueError for a threshold that would send pixels to the first class of a data set that has no background."""
    if protocol.background["rule"] == "threshold" and not data.spec.background:
        raise ValueError(
            f"background: got a threshold with {data.spec.name}, which has no background class: pixels below it would "
            f"count as {data.classes[0]!r}; leave it out"
        )


def _measures(data: SegmentationData, protocol: Protocol, matrix: ConfusionMatrix, per_image: Tensor) -> Measured:
    first = 1 if protocol.foreground and data.spec.background else 0
    scored = list(range(first, len(data.classes)))
    scores = per_image[0]
    if protocol.average == "image":
        miou, chance = float(scores.nanmean()), float(per_image[1].nanmean())
    else:
        miou, chance = matrix.miou(scored), chance_miou(matrix.counts.sum(1), scored, len(data.classes))
    recall, iou = matrix.recall(), matrix.iou()
    metrics = {
        "aAcc": percent(matrix.accuracy(scored)),
        "mIoU": percent(miou),
        "mAcc": percent(float(recall[scored].nanmean())),
        "IoU": {data.classes[k]: percent(float(iou[k])) for k in scored},
        "Acc": {data.classes[k]: percent(float(recall[k])) for k in scored},
    }
    return Measured(matrix, scores, metrics, 100 * chance, _alarms(data, matrix, miou, chance, scored))


def _alarms(
    data: SegmentationData, matrix: ConfusionMatrix, miou: float, chance: float, scored: list[int]
) -> list[str]:
    """What an mIoU below chance, or a far better one with all labels moved by one, says."""
    moved = {}
    for step in (1, -1):
        other = ConfusionMatrix(len(data.classes))
        other.counts = matrix.counts.roll(-step, dims=1)
        moved[step] = other.miou(scored)
    step = max(moved, key=moved.get)
    if moved[step] > max(0.05, 2 * miou, 2 * chance):  # below 5 % it may be luck
        return [
            f"labels are probably shifted: mIoU is {100 * miou:.2f}, and {100 * moved[step]:.2f} with every prediction "
            + ("lowered" if step > 0 else "raised")
            + " by one"
        ]
    if not miou >= chance:
        return [
            f"mIoU {100 * miou:.2f} is below chance ({100 * chance:.2f}): labels are probably shifted, or the model is "
            "not trained"
        ]
    return []


class SegmenterPredictor:
    """Labels by the classes' cosines: `predict(image, labels)`. embedder: None for the model's own projection."""

    def __init__(self, towers: Towers, embedder: nn.Module | None, data: SegmentationData, protocol: Protocol):
        check_background(data, protocol)
        self.segmenter = Segmenter(
            towers,
            embedder,
            stride=protocol.stride,
            short_side=protocol.short_side,
            window=protocol.window,
            window_stride=protocol.window_stride,
        )
        prompts = protocol.templates
        prompts = templates(prompts) if isinstance(prompts, str) else prompts
        self.texts = class_texts(towers, [", ".join(names) for names in data.synonyms], prompts)
        self.rule = _rule(data, protocol)

    def __call__(self, image: Image.Image, labels: Sequence[int]) -> Tensor:
        # Where a rule finds the background, that class does not compete, and the segmenter's labels begin at 1.
        dense = self.segmenter.dense(image)
        if self.rule:
            return dense.labels(_some(self.texts, range(1, len(self.texts.names))), **self.rule).labels.cpu()
        chosen = dense.labels(_some(self.texts, labels)).labels.cpu()
        return chosen.new_tensor(list(labels))[chosen.long()]


def _rule(data: SegmentationData, protocol: Protocol) -> dict[str, float]:
    """Of the segmenter for background; nothing where its class competes, and in data sets that have none."""
    rule = protocol.background
    if rule["rule"] == "class" or not data.spec.background:
        return {}
    if rule["rule"] == "threshold":
        return {"threshold": rule["value"]}
    return {"entropy": rule["value"], "logit_scale": rule.get("logit_scale", 100.0)}


def _some(texts: Texts, classes: Sequence[int]) -> Texts:
    """The texts of some of the classes, in that order."""
    rows = texts.embeddings.split(texts.synonyms)
    return Texts(
        tuple(texts.names[k] for k in classes),
        tuple(texts.synonyms[k] for k in classes),
        torch.cat([rows[k] for k in classes]),
    )
