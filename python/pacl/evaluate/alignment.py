"""Alignment of words and patches: the measure, and `pacl evaluate alignment`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..flags import parse
from ..processes import add_up, place_in
from ..segment.predict import Segmenter
from ..segment.prompts import Texts, class_texts, templates
from .metrics import HALF, add_hits
from .patches import PatchOptions, labelled_patches
from .plots import bars, print_plot
from .segmentation_data import SegmentationData
from .specs import IGNORED


@dataclass
class Alignment:
    """Counts of correctly classified patches. Background is not a class.

    counts: int64 [3, K], per class: all its patches, those that its word won among the words of all classes, and those
    that it won among the classes present in the image. chance: expected value of the third, as a fraction of patches.
    """

    counts: Tensor
    chance: float

    def metrics(self) -> dict[str, float]:
        """Return accuracy over patches and its mean over classes, as fractions, for both sets of competing words."""
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
    """Classify patches by their most similar text; a patch counts if one class covers at least half of it.

    segmenter: stride 1 and no windows, so that patches tile the image. texts: those of data's classes. group: every
    process measures its share of the images, and all return the totals. Raises ValueError if no patch counts. This is
    the patch accuracy of PACL (Mukhoti et al., CVPR 2023); the paper does not name the competing classes, hence both.
    """
    first = int(data.spec.background)
    counts = torch.zeros(3, len(data.classes), dtype=torch.int64)
    chance = torch.zeros(len(data), dtype=torch.float64)  # per image: the sum is the same for any number of processes
    for i, dense, truth, present in labelled_patches(data, segmenter, label, group):
        keep = truth != IGNORED
        true = truth[keep]
        scores = dense.scores(texts).cpu()[:, keep]
        found = scores[first:].argmax(0) + first
        among = torch.tensor(present)[scores[present].argmax(0)]
        add_hits(counts, true, found == true, among == true)
        chance[i] = len(true) / len(present)
    add_up(counts, group)
    add_up(chance, group)
    if not counts[0].sum():
        raise ValueError(f"data: no class covers half of a patch in {len(data)} images of {data.spec.name}")
    return Alignment(counts, float(chance.sum()) / int(counts[0].sum()))


@dataclass(frozen=True, kw_only=True)
class AlignmentOptions(PatchOptions):
    """Measure how well words find patches: classify each patch by the most similar word, among all classes and among
    the image's own.
    """

    templates: str = "simple"
    """Prompt templates for the words: none, photo, simple, openai, or a file with one per line."""
    plain: bool = False
    """Measure the model's own projection of patches too, besides the checkpoint's embedder."""


def main(argv: Sequence[str], prog: str = "pacl evaluate alignment") -> int:
    """Run `pacl evaluate alignment` and return its exit status."""
    options = parse(AlignmentOptions, argv, prog)
    sentences, data = templates(options.templates), options.read()
    group = options.group()
    towers, embedder = options.load()
    texts = class_texts(towers, [", ".join(names) for names in data.synonyms], sentences)
    rank, first, shown = place_in(group)[0], int(data.spec.background), {}
    for name, embed in _embedders(embedder, options.plain).items():
        segmenter = Segmenter(towers, embed, short_side=options.short_side)
        found = alignment(data, segmenter, texts, f"alignment {name}", group=group)
        if rank:
            continue
        rules = {"name": f"alignment {name}", "short_side": segmenter.short_side, "share": HALF}
        patches, *hits = found.counts[:, first:].tolist()
        more = options.describe(data) | {"patches": sum(patches), "chance_image_classes": found.chance}
        more["patches_of_class"] = dict(zip(data.classes[first:], patches, strict=True))
        rules["templates"] = list(sentences)
        path = options.write("patch_classification", data.spec.name, rules, found.metrics(), towers, **more)
        for what, each in zip(("all classes", "the image's classes"), hits, strict=True):
            shown[f"{name}, among {what}"] = [x / max(1, n) for x, n in zip(each, patches, strict=True)]
    if rank:
        return 0
    there = [k for k, n in enumerate(patches) if n]
    shown = {name: [each[k] for k in there] for name, each in shown.items()}
    plot = bars([data.classes[first + k] for k in there], shown, f"{data.spec.title}: patches by words")
    print_plot(path.with_suffix(".png"), (8, 2 + 0.15 * len(there) * len(shown)), plot)
    print(options.next_command())
    return 0


def _embedders(embedder: nn.Module | None, plain: bool) -> dict[str, nn.Module | None]:
    """Return embedders by their name in results; without a checkpoint, only the model's own projection (None)."""
    return ({"embedder": embedder} if embedder else {}) | ({"plain": None} if plain or not embedder else {})
