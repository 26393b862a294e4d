"""Image-text retrieval among the pairs of a source, and `pacl evaluate retrieval`.

The images are streamed: each is read once for every way of scoring and never kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..commands import LEFT_OUT
from ..data.flags import PairFlags
from ..data.samples import LEAST_SEEN, BadData, Samples, loader, no_image
from ..flags import parse
from ..processes import default_workers, gather_rows, place_in, shared_progress
from ..resolution import images_of
from .metrics import RECALLS, Retrieval
from .options import TaskOptions
from .scorer import Scorer


@dataclass(frozen=True)
class Gallery:
    """Captions of a set of images.

    captions: those of all images, in their order. owners: the image of each caption, from 0. mine, said: ranges of this
    process's images and of their captions. skipped: bad samples of all processes, by reason.
    """

    captions: list[str]
    owners: list[int]
    mine: range
    said: range
    skipped: dict[str, int]

    @property
    def images(self) -> int:
        return self.owners[-1] + 1


def read_gallery(
    data: Samples, *, batch_size: int = 64, workers: int = 0, group: dist.ProcessGroup | None = None
) -> Gallery:
    """Read all captions of every image of `data`.

    batch_size, workers: those of the `retrieval` that follows; they determine the order of the samples. group: `data`
    is opened with this process's rank in it, and the gallery holds the captions of all processes. Raises ValueError if
    there is no usable pair.
    """
    texts = data.with_options(captions="all", transform=no_image)
    own = [captions for batch in _read(texts, batch_size, workers) for captions in batch["captions"]]
    rank, world = place_in(group)
    both: list[Any] = [(own, data.skipped)]
    if group is not None:
        both = [None] * world
        dist.all_gather_object(both, (own, data.skipped), group=group)
    shares, counts = zip(*both, strict=True)
    images = [each for share in shares for each in share]
    skipped = {reason: sum(one[reason] for one in counts) for reason in data.skipped}
    bad = sum(skipped.values())
    if not images or bad > data.max_bad_share * (bad + len(images)) and bad + len(images) >= LEAST_SEEN:
        raise ValueError(f"data: {bad:,} of {bad + len(images):,} samples of {data.name} are bad")
    captions, owners = [text for each in images for text in each], [i for i, each in enumerate(images) for _ in each]
    image = sum(map(len, shares[:rank]))
    text = sum(len(each) for each in images[:image])
    mine, said = range(image, image + len(own)), range(text, text + sum(map(len, own)))
    return Gallery(captions, owners, mine, said, skipped)


def retrieval(
    data: Samples,
    gallery: Gallery,
    scorer: Scorer,
    *,
    batch_size: int = 64,
    workers: int = 0,
    group: dist.ProcessGroup | None = None,
) -> dict[str, float]:
    """Return recalls at 1, 5 and 10, text to image and image to text, as fractions.

    gallery: read from the same data. Scores exist for a few images and all texts at a time. group: that of
    read_gallery; all its processes return the same. Raises ValueError if the samples have changed since.
    """
    own = gallery.captions[gallery.said.start : gallery.said.stop]
    texts = gather_rows(scorer.towers.embed(own) if own else torch.empty(0, 0, device=scorer.device), group)
    result = Retrieval(gallery.captions, None, None, scorer.device, gallery.owners)
    data = data.with_options(captions="all")
    at, text = gallery.mine.start, gallery.said.start
    with shared_progress(f"retrieval {scorer.rules['name']}", len(gallery.mine), "image", group) as shown:
        for batch in _read(data, batch_size, workers):
            found = [caption for captions in batch["captions"] for caption in captions]
            if found != gallery.captions[text : text + len(found)]:
                raise ValueError("data: its samples changed while they were read")
            text += len(found)
            for phi in scorer.blocks(images_of(batch), texts):
                result.update(phi, at)
                at += len(phi)
            for _ in batch["key"]:
                shown.step()
    if at != gallery.mine.stop:
        raise ValueError("data: its samples changed while they were read")
    return result.values(group)


def _read(data: Samples, batch_size: int, workers: int) -> Iterator[dict]:
    workers = min(workers, data.most_workers)
    try:
        yield from loader(data, batch_size, workers=workers)
    except BadData as error:  # raised in a worker, so its message has a traceback
        if data.world > 1 and workers < 2 and not data.seen:
            return  # there are more processes than samples
        raise ValueError(f"data: {data.complaint()}") from error


@dataclass(frozen=True, kw_only=True)
class RetrievalOptions(TaskOptions, PairFlags):
    """Measure image-text retrieval with phi, the compatibility of an image and a text: recall at 1, 5 and 10 as
    fractions. All captions of an image count.
    """

    data: str
    """Pairs in any format of pacl train: .tar shards, csv, a folder, COCO's captions .json, or synthetic:eval."""
    scenes: int = 1000
    """Number of scenes to generate for synthetic data."""
    plain: bool = False
    """Measure the model's own image embedding too, besides phi."""
    batch_size: int = 64
    """Images per batch."""
    workers: int = field(default_factory=default_workers)
    """Processes that decode images."""


def main(argv: Sequence[str], prog: str = "pacl evaluate retrieval") -> int:
    """Run `pacl evaluate retrieval` and return its exit status."""
    options = parse(RetrievalOptions, argv, prog)
    data = options.open(options.data, scenes=options.scenes)  # report errors in the data before the model loads
    group = options.group()
    data.rank, data.world = place_in(group)
    towers, embedder = options.load()
    scorers = [Scorer(towers, embedder)] + ([Scorer(towers, plain=True)] if options.plain else [])
    data.transform = towers.transform
    reading: dict[str, Any] = {"batch_size": options.batch_size, "workers": options.workers, "group": group}
    gallery = read_gallery(data, **reading)
    skipped = {reason: count for reason, count in gallery.skipped.items() if count}
    for scorer in scorers:
        found = retrieval(data, gallery, scorer, **reading)
        # CLIP_benchmark names a recall after the retrieved kind.
        metrics = {
            f"{what}_retrieval_recall@{k}": found[f"{way}_R@{k}"]
            for what, way in (("image", "text_to_image"), ("text", "image_to_text"))
            for k in RECALLS
        }
        rules = scorer.rules | {"name": f"retrieval {scorer.rules['name']}"}
        counts = {"images": gallery.images, "texts": len(gallery.captions), "skipped": skipped}
        if data.rank == 0:
            name = "_".join(filter(None, (Path(options.data).stem, options.split)))
            options.write("zeroshot_retrieval", name, rules, metrics, towers, **counts)
    if data.rank == 0:
        if skipped:
            print(f"left out: {', '.join(f'{reason} {count:,}' for reason, count in skipped.items())}")
        print(options.next_command())
    # torchrun takes any status but 0 for a crash, and ends the other processes.
    return LEFT_OUT if skipped and data.world == 1 else 0
