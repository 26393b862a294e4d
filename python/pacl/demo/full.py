"""`pacl demo --full`: all measures of the paper on generated scenes, for plain CLIP, the control and PACL.

The measures are those of pacl.evaluate, on the demo's evaluation scenes, with raw class names as texts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image
from torch import Tensor, nn

from ..data.pairs import Pairs
from ..data.raw import Raw, read_captions
from ..data.scene_shards import SPLITS, encode_scene
from ..data.scenes import CLASSES, HELD_OUT, HELD_OUT_LABELS, PAIRS, SEEN_LABELS, draw_scene, phrase
from ..data.shards import Shards
from ..embedder import VisionEmbedder
from ..evaluate.alignment import alignment
from ..evaluate.classification import accuracies, classification
from ..evaluate.coherence import coherence
from ..evaluate.retrieval import read_gallery, retrieval
from ..evaluate.scorer import Scorer
from ..evaluate.segmentation_data import SegmentationData
from ..evaluate.segmentation_measure import SegmenterPredictor, evaluate_segmentation
from ..evaluate.specs import IGNORED, Protocol, Spec, fingerprint
from ..progress import Progress, quiet
from ..segment.predict import Segmenter
from ..segment.prompts import TEMPLATES, class_texts
from ..towers import Towers
from . import evaluation
from .evaluation import finite
from .toy_clip import CONFIG

STRIDES = (1, 2, 4)
METHODS = {name: label for name, label in evaluation.METHODS.items() if name != "oracle"}
TOKENS = {"vision": "CLIP's tokens", **METHODS}
SCORES = {
    "clip": "CLIP's image embedding",
    "clip_patches": "φ of CLIP's patches",
    "mean_pooling": "Mean pooling",
    "pacl": "φ of PACL",
}
GROUPS = {**evaluation.GROUPS, "backgrounds": tuple(range(len(PAIRS), len(CLASSES)))}
PER_PAIR = 30  # evaluation scenes for each scene with one shape of a pair
STRIDE_SHARE = 3  # strides are measured on a third of the scenes, because stride 4 has 13 times as many tokens
COHERENCE_PAIRS = 200_000


class SceneData:
    """Scenes and their masks as a dataset of pacl.evaluate; `data[i]` is an RGB image and its labels, int16 [H, W].

    only: the labels that count; all other pixels are IGNORED. None: all count.
    """

    def __init__(self, scenes: Sequence[Raw], only: Sequence[int] | None = None):
        self.scenes, self.only = _Scenes(scenes, transform=_same, masks=True), only
        self.classes, self.synonyms = list(CLASSES), [[name] for name in CLASSES]
        self.class_hash = fingerprint(self.synonyms)
        self.spec = Spec(
            name="scenes",
            title="Generated scenes",
            column="Scenes",
            classes=CLASSES,
            background=False,
            count=(len(scenes),),
            source="pacl demo",
            roots=(),
            images=(),
            split=None,
            masks=(),
        )

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, i: int) -> tuple[Image.Image, np.ndarray]:
        sample = self.scenes.decode(self.scenes.get(i, 0))
        assert sample is not None  # generated scenes are never bad
        labels = sample["mask"].numpy().astype(np.int16)
        if self.only is not None:
            labels[~np.isin(labels, self.only)] = IGNORED
        return sample["image"], labels


def _dataset(scenes: Sequence[Raw], only: Sequence[int] | None = None) -> SegmentationData:
    """Return SceneData typed as a SegmentationData, of which it has all that these measures use."""
    return cast(SegmentationData, SceneData(scenes, only))


class _Scenes(Pairs):
    """Pairs in memory."""

    def __init__(self, scenes: Sequence[Raw], **options: Any):
        super().__init__("generated scenes", **options)
        self.scenes = scenes

    def __len__(self) -> int:
        return len(self.scenes)

    def get(self, index: int, epoch: int) -> Raw:
        return self.scenes[index]


@dataclass(frozen=True)
class Models:
    """The demo's models.

    towers: the frozen CLIP. embedders: "pacl", "mean_pooling", and "clip", which is None: CLIP's own projection.
    """

    towers: Towers
    embedders: dict[str, VisionEmbedder | None]

    def segmenter(self, method: str, stride: int = 1) -> Segmenter:
        embedder = nn.Identity() if method == "vision" else self.embedders[method]
        return Segmenter(self.towers, embedder, stride=stride)

    def scorer(self, name: str) -> Scorer:
        return Scorer(self.towers, self.embedders["clip" if name == "clip_patches" else name], plain=name == "clip")


def read_scenes(shards: Sequence[Path]) -> list[Raw]:
    """Return all scenes of shards, encoded, about 5 kB each."""
    return list(Shards(shards, masks=True).undecoded(0, 0, 1))


def measure(models: Models, scenes: Sequence[Raw], seed: int) -> dict[str, Any]:
    """Return all measures as fractions, by task, method and group, as JSON values: the contents of full.json.

    The groups are the seen pairs, the held-out pairs, and the backgrounds; all classes compete.
    """
    start = time.perf_counter()
    data = _dataset(scenes)
    galleries = _galleries(scenes)
    singles = one_shape_scenes(models.towers.transform, max(1, len(scenes) // PER_PAIR), seed)
    parts = len(METHODS) * (2 + len(STRIDES)) + len(TOKENS) * 3 + len(galleries) * len(SCORES) + 1
    with Progress("Full report", parts, "measure") as progress:
        part = _Part(progress)
        found = {
            "patch_accuracy": _patch_accuracy(models, data, part),
            "coherence": _coherence(models, scenes, seed, part),
            "segmentation": _segmentation(models, data, STRIDES[:1], part),
            "strides": _segmentation(models, _dataset(scenes[: max(1, len(scenes) // STRIDE_SHARE)]), STRIDES, part),
            "retrieval": {name: _retrieval(models, each, part) for name, each in galleries.items()},
            "classification": _classification(models, singles, part),
        }
    return {"scenes": len(scenes), **found, "seconds": round(time.perf_counter() - start, 1)}


class _Part:
    """Context manager `with part():` for one step of the progress; other progress inside it is hidden."""

    def __init__(self, progress: Progress):
        self.progress = progress

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with quiet():
            yield
        self.progress.step()


def _patch_accuracy(models: Models, data: SegmentationData, part: Callable) -> dict[str, Any]:
    """Return the share of a group's patches whose own word is the most similar, among all words and the image's."""
    texts = class_texts(models.towers, CLASSES, TEMPLATES["none"])
    found: dict[str, Any] = {}
    for method in METHODS:
        with part():
            whole = alignment(data, models.segmenter(method), texts)
        found[method] = {}
        for group, labels in GROUPS.items():
            of_group = dataclasses.replace(whole, counts=whole.counts[:, labels])
            if int(of_group.counts[0].sum()):
                found[method][group] = of_group.metrics() | {"patches": int(of_group.counts[0].sum())}
        patches, right = whole.counts[:2].tolist()
        shares = [k / n if n else None for n, k in zip(patches, right, strict=True)]
        found[method]["classes"] = dict(zip(CLASSES, shares, strict=True))
    return found | {"chance_image_classes": whole.chance}


def _coherence(models: Models, scenes: Sequence[Raw], seed: int, part: Callable) -> dict[str, Any]:
    """Return AUC and ROC of "same class" by the cosine of two patches of a group."""
    found: dict[str, Any] = {name: {} for name in TOKENS}
    for group, labels in {"all": None, "seen": SEEN_LABELS, "held_out": HELD_OUT_LABELS}.items():
        for name in TOKENS:
            with part():
                try:
                    each = coherence(_dataset(scenes, labels), models.segmenter(name), pairs=COHERENCE_PAIRS, seed=seed)
                except ValueError as error:
                    if not str(error).startswith("data:"):  # "data:" means too few scenes for a pair of patches
                        raise
                    continue
                found[name][group] = {"auc": each.auc(), "pairs": len(each.same), "roc": each.roc()}
    return found


def _segmentation(models: Models, data: SegmentationData, strides: Sequence[int], part: Callable) -> dict[str, Any]:
    """Return the mIoU of the groups' classes over all pixels of all scenes, by stride."""
    found: dict[str, Any] = {"scenes": len(data), **{method: {} for method in METHODS}}
    size = CONFIG["model_cfg"]["vision_cfg"]["image_size"]
    for stride in strides:
        rules = Protocol(f"scenes, stride {stride}", size, "none", {"rule": "class"}, stride=stride)
        for method in METHODS:
            with part():
                predict = SegmenterPredictor(models.towers, models.embedders[method], data, rules)
                measured = evaluate_segmentation(data, predict, rules)
            values = {group: finite(measured.matrix.miou(labels)) for group, labels in GROUPS.items()}
            found[method][str(stride)] = values | {"pixels_right": finite(measured.matrix.accuracy())}
    return found | {"chance_miou": measured.chance / 100}


def _galleries(scenes: Sequence[Raw]) -> dict[str, list[Raw]]:
    """Return scenes by group: all; held_out, whose captions name a held-out pair; seen, as many that have none."""
    data = SceneData(scenes)
    found: dict[str, list[Raw]] = {"all": list(scenes), "seen": [], "held_out": []}
    for i, scene in enumerate(scenes):
        captions, _ = read_captions(scene.captions)
        named = {pair for pair in PAIRS if phrase(pair) in captions[0]}
        if named & set(HELD_OUT):
            found["held_out"].append(scene)
        elif named and not np.isin(data[i][1], HELD_OUT_LABELS).any():
            found["seen"].append(scene)
    fewer = min(len(found["seen"]), len(found["held_out"]))
    found |= {name: found[name][:fewer] for name in ("seen", "held_out")}
    return {name: each for name, each in found.items() if each}


def _retrieval(models: Models, scenes: list[Raw], part: Callable) -> dict[str, Any]:
    data = _Scenes(scenes, transform=models.towers.transform)
    with quiet():
        gallery = read_gallery(data)
    found: dict[str, Any] = {"images": gallery.images, "distinct_captions": len(set(gallery.captions))}
    for name in SCORES:
        with part():
            found[name] = retrieval(data, gallery, models.scorer(name))
    return found


def one_shape_scenes(transform: Callable[[Image.Image], Tensor], each: int, seed: int) -> list[tuple[Tensor, int]]:
    """Draw `each` scenes of one shape for every pair; return images and labels. None is in the demo's shards."""
    labels = [label for label in range(len(PAIRS)) for _ in range(each)]
    raws = []
    for i, label in enumerate(labels):
        scene = draw_scene(np.random.default_rng([seed, len(SPLITS), label, i]), (PAIRS[label],))
        sample = encode_scene(scene, f"one-{i:06d}", mask=False)
        raws.append(Raw(sample["__key__"], sample["jpg"], sample["txt"]))
    scenes = _Scenes(raws, transform=transform)
    return [(sample["image"], label) for sample, label in zip(scenes, labels, strict=True)]


def _classification(models: Models, singles: list[tuple[Tensor, int]], part: Callable) -> dict[str, Any]:
    """Return the share of one-shape scenes whose pair's words score best among all pairs."""
    texts = class_texts(models.towers, CLASSES[: len(PAIRS)], TEMPLATES["none"])
    with part():
        counts = classification(singles, texts, [models.scorer(name) for name in SCORES])
    found: dict[str, Any] = {"images": len(singles), "classes": len(PAIRS)}
    for name, count in zip(SCORES, counts, strict=True):
        groups = {"all": tuple(range(len(PAIRS))), "seen": SEEN_LABELS, "held_out": HELD_OUT_LABELS}
        found[name] = {group: accuracies(count[:, labels])["acc1"] for group, labels in groups.items()}
    return found


def _same(image: Image.Image) -> Image.Image:
    return image
