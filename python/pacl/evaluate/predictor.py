"""A Segmenter as a predictor, by a protocol."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor, nn

from ..segment.predict import Segmenter
from ..segment.prompts import Texts, class_texts, templates
from ..towers import Towers
from .data import SegmentationData
from .measure import check_background
from .specs import Protocol


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
