"""Zero-shot classification: the measure, and `pacl evaluate classification`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from ..failures import sentence
from ..flags import parse
from ..processes import add_up, default_workers, place_in, shared_progress
from ..resolution import images_of, join_images
from ..segment.prompts import TEMPLATES, Texts, best_synonym, class_texts, templates
from .classification_data import Labelled
from .metrics import add_hits
from .options import DatasetOptions
from .scorer import Scorer


def classification(
    data: Labelled | Sequence[tuple[Tensor, int]],
    texts: Texts,
    scorers: Sequence[Scorer],
    *,
    batch_size: int = 64,
    workers: int = 0,
    label: str = "classification",
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Count hits: int64 [scorers, 3, K], the input of `accuracies` for each scorer.

    data: transformed images with their classes, shared among the processes of `group`. The score of a class is that of
    its best synonym.
    """
    counts = torch.zeros(len(scorers), 3, len(texts.names), dtype=torch.int64)
    # Each process takes whole batches: in a batch of another size an image's scores would differ by rounding.
    rank, world = place_in(group)
    batches = [part.tolist() for part in torch.arange(len(data)).split(batch_size)[rank::world]]
    loader = DataLoader(cast(Dataset, data), batch_sampler=batches, num_workers=workers, collate_fn=_collate)
    with shared_progress(label, len(loader), "batch", group) as shown:
        for batch in loader:
            images = images_of(batch)
            for count, scorer in zip(counts, scorers, strict=True):
                scores = torch.cat(list(scorer.blocks(images, texts.embeddings)))
                count_hits(count, best_synonym(scores, texts.synonyms), batch["label"])
            shown.step()
    add_up(counts, group)
    return counts


def _collate(samples: list[tuple[Tensor, int]]) -> dict[str, Any]:
    named: list[dict[str, Any]] = [{"image": image, "label": label} for image, label in samples]
    several = join_images(named)
    return default_collate(named) | several


def accuracies(counts: Tensor) -> dict[str, float | None]:
    """Return CLIP_benchmark's measures, as fractions.

    counts: int64 [3, K], per class: all images, those classified correctly, and those with it among the best five.
    """
    there = counts[0] > 0
    total = int(counts[0].sum())
    return {
        "acc1": int(counts[1].sum()) / total,
        "acc5": int(counts[2].sum()) / total if len(there) >= 5 else None,
        "mean_per_class_recall": float((counts[1, there].double() / counts[0, there]).mean()),
    }


def count_hits(counts: Tensor, scores: Tensor, labels: Tensor) -> None:
    """Add to counts [3, K] the images with `scores` [B, K] and classes `labels` [B]; raises ValueError for NaN."""
    if scores.isnan().any():
        raise ValueError("scores: got NaN, expected numbers")
    best = scores.topk(min(5, scores.shape[1])).indices.cpu() == labels[:, None]
    add_hits(counts, labels, best[:, 0], best.any(1))


@dataclass(frozen=True, kw_only=True)
class ClassificationOptions(DatasetOptions):
    """Measure zero-shot classification with phi, the compatibility of an image and a text, as the score of a class, and
    with the model's own image embedding: acc1, acc5 and mean per-class recall, as fractions.
    """

    dataset: str
    """One of imagenet, cifar10, cifar100, food101, caltech101, dtd, eurosat, flowers102, pets, cars, sun397, stl10;
    folder (a folder per class); or wds (clip-benchmark's tar files)."""
    templates: str | None = None
    """Prompt templates: none, photo, simple, openai, or a file; by default those of the dataset, else simple."""
    plain: bool = True
    """Measure the model's own image embedding too, besides phi."""
    batch_size: int = 64
    """Images per batch."""
    workers: int = field(default_factory=default_workers)
    """Processes that decode images."""


def main(argv: Sequence[str], prog: str = "pacl evaluate classification") -> int:
    """Run `pacl evaluate classification` and return its exit status."""
    options = parse(ClassificationOptions, argv, prog)
    data = Labelled(options.dataset, **options.reading)
    sentences = data.templates if options.templates is None else templates(options.templates)
    sentences = sentences or TEMPLATES["simple"]
    group = options.group()
    rank, _ = place_in(group)
    towers, embedder = options.load()
    data.transform = towers.transform
    texts = class_texts(towers, [", ".join(names) for names in data.synonyms], sentences)
    plain = options.plain and not towers.names["vision_model"]
    if options.plain and not plain and rank == 0:
        print("plain: skipped, because this vision tower has no image embedding in the text space", file=sys.stderr)
    scorers = [Scorer(towers, embedder)] + ([Scorer(towers, plain=True)] if plain else [])
    reading: dict[str, Any] = {"batch_size": options.batch_size, "workers": options.workers, "group": group}
    try:
        counts = classification(data, texts, scorers, **reading, label=f"classification {options.dataset}")
    except (ValueError, OSError) as error:  # a worker's message puts its traceback before the line that matters
        raise ValueError(sentence(error)) from error
    if rank:
        return 0
    dataset = options.dataset if data.kind.count else options.data_root.resolve().name
    classes = {"count": len(data.synonyms), "sha256": data.class_hash}
    sizes = {"classes": classes, "images": len(data), "images_of_the_set": data.kind.count}
    for scorer, count in zip(scorers, counts, strict=True):
        rules = scorer.rules | {"name": f"classification {scorer.rules['name']}", "templates": list(sentences)}
        options.write("zeroshot_classification", dataset, rules, accuracies(count), towers, **sizes)
    print(options.next_command())
    return 0
