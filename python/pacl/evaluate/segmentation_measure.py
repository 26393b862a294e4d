"""Measure IoU and accuracy of a predictor on a dataset, by a protocol; make a predictor of a Segmenter."""

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

# Maps an RGB image and the competing labels to a label per pixel, integers [H, W].
Predictor = Callable[[Image.Image, Sequence[int]], "Tensor | np.ndarray"]


@dataclass
class Measured:
    """Measures of a predictor on a dataset.

    Attributes:
        matrix: confusion matrix of the whole dataset.
        scores: float64 `[images]`, the mean IoU of each image over its own classes, NaN if no pixel counts.
        metrics: `aAcc`, `mIoU`, `mAcc`, and `IoU` and `Acc` per class, in percent with two decimals, None for an absent
            class.
        chance: the mIoU of labels drawn at random.
        warnings: a sentence for everything that looks wrong.
    """

    matrix: ConfusionMatrix
    scores: Tensor
    metrics: dict
    chance: float
    warnings: list[str]


def evaluate_segmentation(
    data: SegmentationData, predict: Predictor, protocol: Protocol, *, group: dist.ProcessGroup | None = None
) -> Measured:
    """Measure a function that labels images on a dataset.

    Args:
        data: images and labels.
        predict: takes an RGB image and the competing labels, and returns a label per pixel, integers `[H, W]`.
        protocol: rules that say which labels compete and how the mIoU is taken.
        group: processes that share the images; all return the totals.

    Returns:
        The measures of all images.

    Raises:
        ValueError: for a threshold on a dataset without background, and for predicted labels that do not compete.
    """
    check_background(data, protocol)
    rank, world = place_in(group)
    classes = len(data.classes)
    matrix = ConfusionMatrix(classes, ignore=IGNORED)
    per_image = torch.zeros(2, len(data), dtype=torch.float64)  # score, and the score of chance
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
                    raise ValueError(
                        f"predict: got label {min(stray)}, expected one of the {len(candidates)} that compete"
                    )
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
    """Return the labels that compete for an image, and the truth with the pixels ignored that the protocol ignores."""
    if protocol.candidates == "all":
        return list(range(len(data.classes))), truth
    if protocol.foreground and data.spec.background:
        truth = np.where(truth == 0, IGNORED, truth)
    return [x for x in np.unique(truth).tolist() if x != IGNORED], truth


def check_background(data: SegmentationData, protocol: Protocol) -> None:
    """Raise ValueError for a threshold on a dataset without background: it would send pixels to the first class."""
    if protocol.background["rule"] == "threshold" and not data.spec.background:
        raise ValueError(
            f"background: got a threshold with {data.spec.name}, expected none: it has no background class, so pixels "
            f"below the threshold would count as {data.classes[0]!r}"
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
    """Warn of an mIoU below chance, and of a far better one after a shift of all labels by one."""
    moved = {}
    for step in (1, -1):
        other = ConfusionMatrix(len(data.classes))
        other.counts = matrix.counts.roll(-step, dims=1)
        moved[step] = other.miou(scored)
    step = max(moved, key=lambda step: moved[step])
    if moved[step] > max(0.05, 2 * miou, 2 * chance):  # below 5 % it may be chance
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
    """Predict labels by the classes' cosines: `predict(image, labels)`. embedder: None for the model's projection."""

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
        # If a rule finds the background, that class does not compete, and the segmenter's labels begin at 1.
        dense = self.segmenter.dense(image)
        if self.rule:
            return dense.labels(_some(self.texts, range(1, len(self.texts.names))), **self.rule).labels.cpu()
        chosen = dense.labels(_some(self.texts, labels)).labels.cpu()
        return chosen.new_tensor(list(labels))[chosen.long()]


def _rule(data: SegmentationData, protocol: Protocol) -> dict[str, float]:
    """Return the segmenter's options for background; none if that class competes or the dataset lacks it."""
    rule = protocol.background
    if rule["rule"] == "class" or not data.spec.background:
        return {}
    if rule["rule"] == "threshold":
        return {"threshold": rule["value"]}
    return {"entropy": rule["value"], "logit_scale": rule.get("logit_scale", 100.0)}


def _some(texts: Texts, classes: Sequence[int]) -> Texts:
    """Select the texts of some classes, in the given order."""
    rows = texts.embeddings.split(texts.synonyms)
    return Texts(
        tuple(texts.names[k] for k in classes),
        tuple(texts.synonyms[k] for k in classes),
        torch.cat([rows[k] for k in classes]),
    )
