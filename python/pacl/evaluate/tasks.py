"""The other tasks of `pacl evaluate`: their flags, and a JSON row for each result."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
import tyro
from torch import nn

from ..data import Kind
from ..data.sources import open_pairs
from ..processes import choose_device, process_group
from ..segment.predict import Segmenter
from ..segment.prompts import TEMPLATES, class_texts, templates
from ..sharing import load_model
from ..towers import Towers
from .data import SegmentationData
from .ranks import place_in
from .report import names_of, write_row


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What all have."""

    checkpoint: str | None = None
    """Folder of a PACL embedder, or its name on the Hub; without it the open_clip model alone is measured."""
    model: str = "ViT-B-16"
    """open_clip's name, where no checkpoint names it."""
    pretrained: str | None = None
    """Tag or file of the model's weights, which a model by its name must have."""
    out: Path = Path("results")
    """Folder for JSON files and plots."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""

    def group(self) -> dist.ProcessGroup | None:
        return process_group(choose_device(self.device))

    def load(self) -> tuple[Towers, nn.Module | None]:
        return load_model(self.checkpoint, self.model, self.pretrained, choose_device(self.device))

    def write(self, task: str, dataset: str, rules: dict[str, Any], metrics: dict, towers: Towers, **more) -> Path:
        """A row like CLIP_benchmark's, with the rules that make its numbers comparable; for the first process alone."""
        row = {"dataset": dataset, **names_of(towers, self.checkpoint), "task": task, "language": "en"}
        row |= {"protocol": rules, **more, "metrics": metrics}
        path = write_row(self.out, row)
        print(f"{dataset} {rules['name']}: " + ", ".join(f"{k} {x:.4f}" for k, x in metrics.items() if x is not None))
        print(path, flush=True)
        return path


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig(ModelConfig):
    """Image-text retrieval with φ: recall at 1, 5 and 10 as fractions. COCO captions count with all of an image's."""

    data: str
    """Pairs in any form that pacl train takes: .tar shards, csv, a folder, COCO's captions .json, synthetic:eval."""
    dataset_type: Kind = "auto"
    image_root: Path | None = None
    """Folder of the images of csv and COCO."""
    csv_separator: str | None = None
    csv_img_key: str = "filepath"
    csv_caption_key: str = "title"
    scenes: int = 1000
    """Generated scenes of synthetic."""
    plain: bool = False
    """The model's own image embedding beside φ."""
    batch_size: int = 64
    workers: int = 4


def _retrieval(argv: Sequence[str], prog: str) -> int:
    from .gallery import read_gallery, retrieval
    from .scorer import Scorer

    config = tyro.cli(RetrievalConfig, args=list(argv), prog=prog)
    names = ("image_root", "csv_separator", "csv_img_key", "csv_caption_key", "scenes")
    options = {name: getattr(config, name) for name in names} | {"kind": config.dataset_type}
    data = open_pairs(config.data, **options)  # what is wrong with it is said before the model loads
    group = config.group()
    data.rank, data.world = place_in(group)
    towers, embedder = config.load()
    scorers = [Scorer(towers, embedder)] + ([Scorer(towers, plain=True)] if config.plain else [])
    data.transform = towers.transform
    reading = {"batch_size": config.batch_size, "workers": config.workers, "group": group}
    gallery = read_gallery(data, **reading)
    skipped = {reason: count for reason, count in gallery.skipped.items() if count}
    for scorer in scorers:
        found = retrieval(data, gallery, scorer, **reading)
        # CLIP_benchmark names a recall by what is retrieved.
        metrics = {
            f"{what}_retrieval_recall@{k}": found[f"{way}_R@{k}"]
            for what, way in (("image", "text_to_image"), ("text", "image_to_text"))
            for k in (1, 5, 10)
        }
        rules = scorer.rules | {"name": f"retrieval {scorer.rules['name']}"}
        counts = {"images": gallery.images, "texts": len(gallery.captions), "skipped": skipped}
        if data.rank == 0:
            config.write("zeroshot_retrieval", Path(config.data).stem, rules, metrics, towers, **counts)
    return 0


@dataclass(frozen=True, kw_only=True)
class PatchConfig(ModelConfig):
    data_root: Path
    """Folder of the data set, or the one above it that mmsegmentation calls data."""
    dataset: str = "voc20"
    """A data set of pacl evaluate segmentation; background is no class here."""
    short_side: int | None = None
    """Pixels of the resized image's shorter side; default: the tower's own."""
    class_file: Path | None = None
    """Other class names: a class per line in the labels' order, synonyms separated by commas."""
    limit: int | None = None
    """Only so many images, spread over the set."""
    partial: bool = False
    """Accept a data set that lacks images."""

    def read(self) -> SegmentationData:
        options = {name: getattr(self, name) for name in ("class_file", "limit", "partial")}
        return SegmentationData(self.dataset, self.data_root, **options)


@dataclass(frozen=True, kw_only=True)
class AlignmentConfig(PatchConfig):
    """Whether words find patches: a patch's class by the most similar word, among all and the image's own classes."""

    templates: str = "simple"
    """none, photo, simple or openai, or a file of templates."""
    plain: bool = False
    """The model's own projection of patches beside the checkpoint's embedder."""


def _alignment(argv: Sequence[str], prog: str) -> int:
    from .patches import SHARE, alignment
    from .plots import bars, write_plot

    config = tyro.cli(AlignmentConfig, args=list(argv), prog=prog)
    sentences, data = templates(config.templates), config.read()
    group = config.group()
    towers, embedder = config.load()
    texts = class_texts(towers, [", ".join(names) for names in data.synonyms], sentences)
    rank, first, shown = place_in(group)[0], int(data.spec.background), {}
    for name, embed in _embedders(embedder, config.plain).items():
        segmenter = Segmenter(towers, embed, short_side=config.short_side)
        found = alignment(data, segmenter, texts, f"alignment {name}", group=group)
        if rank:
            continue
        rules = {"name": f"alignment {name}", "short_side": segmenter.short_side, "share": SHARE}
        patches, *hits = found.counts[:, first:].tolist()
        more = _set_of(data) | {"patches": sum(patches), "chance_image_classes": found.chance}
        more["patches_of_class"] = dict(zip(data.classes[first:], patches, strict=True))
        rules["templates"] = list(sentences)
        path = config.write("patch_classification", data.spec.name, rules, found.metrics(), towers, **more)
        for what, each in zip(("all classes", "the image's classes"), hits, strict=True):
            shown[f"{name}, among {what}"] = [x / max(1, n) for x, n in zip(each, patches, strict=True)]
    if rank:
        return 0
    there = [k for k, n in enumerate(patches) if n]
    shown = {name: [each[k] for k in there] for name, each in shown.items()}
    plot = bars([data.classes[first + k] for k in there], shown, f"{data.spec.title}: patches by words")
    return _plotted(write_plot(path.with_suffix(".png"), (8, 2 + 0.15 * len(there) * len(shown)), plot))


@dataclass(frozen=True, kw_only=True)
class CoherenceConfig(PatchConfig):
    """Whether patches of one class have more similar tokens than others: ROC and AUC, without any text; of the vision
    tower's tokens, and of the checkpoint's embeddings."""

    patches: int = 20_000
    """Drawn of the data set's."""
    pairs: int = 1_000_000
    """Drawn of theirs."""
    seed: int = 0


def _coherence(argv: Sequence[str], prog: str) -> int:
    from .patches import SHARE, coherence
    from .plots import curves, write_plot

    config = tyro.cli(CoherenceConfig, args=list(argv), prog=prog)
    for name, least in (("patches", 2), ("pairs", 1), ("seed", 0)):
        if getattr(config, name) < least:
            raise ValueError(f"{name}: got {getattr(config, name)}, expected at least {least}")
    data, shown = config.read(), {}
    group = config.group()
    rank, (towers, embedder) = place_in(group)[0], config.load()
    for name, embed in {"vision": nn.Identity(), **({"embedder": embedder} if embedder else {})}.items():
        segmenter = Segmenter(towers, embed, short_side=config.short_side)
        sample = {x: getattr(config, x) for x in ("patches", "pairs", "seed")}
        found = coherence(data, segmenter, **sample, label=f"coherence {name}", group=group)
        if rank:
            continue
        rules = {"name": f"coherence {name}", "short_side": segmenter.short_side, "share": SHARE, **sample}
        roc = found.roc()
        counts = {"pairs": len(found.same), "pairs_of_one_class": int(found.same.sum())}
        metrics = {"auc": found.auc()}
        path = config.write(
            "semantic_coherence", data.spec.name, rules, metrics, towers, **_set_of(data), **counts, roc=roc
        )
        shown[f"{name}, AUC {metrics['auc']:.3f}"] = tuple(roc.values())
    if rank:
        return 0
    return _plotted(write_plot(path.with_suffix(".png"), (6, 6), curves(shown, f"{data.spec.title}: pairs of patches")))


def _embedders(embedder: nn.Module | None, plain: bool) -> dict[str, nn.Module | None]:
    """By the name that results have; the model's own projection is the only one without a checkpoint."""
    return ({"embedder": embedder} if embedder else {}) | ({"plain": None} if plain or not embedder else {})


def _set_of(data: SegmentationData) -> dict[str, Any]:
    classes = {"count": len(data.classes), "sha256": data.class_hash, "background": data.spec.background}
    return {"classes": classes, "images": len(data), "images_of_the_set": data.spec.count[0]}


def _plotted(path: Path | None) -> int:
    if path is not None:
        print(path)
    return 0


@dataclass(frozen=True, kw_only=True)
class ClassificationConfig(ModelConfig):
    """Zero-shot classification with φ as a class's score, and by the model's own image embedding: acc1, acc5 and mean
    per-class recall, as fractions."""

    data_root: Path
    """Folder that the data set's files lie in, as torchvision has it."""
    dataset: str
    """imagenet, cifar10, cifar100, food101, caltech101, dtd, eurosat, flowers102, pets, cars, sun397, stl10; folder: a
    folder per class; wds: clip-benchmark's tar files."""
    class_file: Path | None = None
    """Other class names: a class per line in the labels' order, synonyms separated by commas, the best one counts."""
    templates: str | None = None
    """none, photo, simple or openai, or a file; default: what the data brings, else simple."""
    plain: bool = True
    """The model's own image embedding beside φ."""
    limit: int | None = None
    """Only so many images, spread over the set."""
    partial: bool = False
    """Accept a data set that lacks images."""
    batch_size: int = 64
    workers: int = 4


def _classification(argv: Sequence[str], prog: str) -> int:
    from .labelled import Labelled, accuracies, classification
    from .scorer import Scorer

    config = tyro.cli(ClassificationConfig, args=list(argv), prog=prog)
    if config.batch_size < 1:
        raise ValueError(f"batch_size: got {config.batch_size}, expected at least 1")
    options = {name: getattr(config, name) for name in ("class_file", "limit", "partial")}
    data = Labelled(config.dataset, config.data_root, **options)
    sentences = data.templates if config.templates is None else templates(config.templates)
    sentences = sentences or TEMPLATES["simple"]
    group = config.group()
    rank, _ = place_in(group)
    towers, embedder = config.load()
    data.transform = towers.transform
    texts = class_texts(towers, [", ".join(names) for names in data.synonyms], sentences)
    plain = config.plain and not towers.names["vision_model"]
    if config.plain and not plain and rank == 0:
        print("plain: this vision tower has no image embedding in the texts' space, left out", file=sys.stderr)
    scorers = [Scorer(towers, embedder)] + ([Scorer(towers, plain=True)] if plain else [])
    options = {"batch_size": config.batch_size, "workers": config.workers, "group": group}
    try:
        counts = classification(data, texts, scorers, **options, label=f"classification {config.dataset}")
    except (ValueError, OSError) as error:  # a worker's has its traceback before the line that says it
        raise ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from error
    if rank:
        return 0
    dataset = config.dataset if data.kind.count else config.data_root.resolve().name
    classes = {"count": len(data.synonyms), "sha256": data.class_hash}
    sizes = {"classes": classes, "images": len(data), "images_of_the_set": data.kind.count}
    for scorer, count in zip(scorers, counts, strict=True):
        rules = scorer.rules | {"name": f"classification {scorer.rules['name']}", "templates": list(sentences)}
        config.write("zeroshot_classification", dataset, rules, accuracies(count), towers, **sizes)
    return 0


TASKS: dict[str, Callable[[Sequence[str], str], int]] = {
    "retrieval": _retrieval,
    "alignment": _alignment,
    "coherence": _coherence,
    "classification": _classification,
}
