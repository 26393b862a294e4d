"""Image-text retrieval among the pairs of a source, and `pacl evaluate retrieval`.

It is streamed: every image is read once for each way of scoring and never kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import tyro

from ..data.flags import PairFlags
from ..data.samples import LEAST_SEEN, BadData, Samples, loader, no_image
from ..processes import gather_rows, place_in, shared_progress
from .metrics import RECALLS, Retrieval
from .options import TaskOptions
from .scorer import Scorer


@dataclass(frozen=True)
class Gallery:
    """captions: of all images, one after the other; owners: the image of each, from 0. Of several processes each has
    the images `mine`, with the captions `said`, both ranges. skipped: bad samples of all by reason.
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
    """All captions of every image of `data`, for `retrieval` with the same batch size and workers, by which samples
    come in another order. ValueError without a usable pair.

    group: `data` was opened with this process's rank among so many, and the gallery is that of all.
    """
    texts = data.with_options(captions="all", transform=no_image)
    own = [captions for batch in _read(texts, batch_size, workers) for captions in batch["captions"]]
    rank, world = place_in(group)
    shares, skipped = [own], [data.skipped]
    if group is not None:
        both = [None] * world
        dist.all_gather_object(both, (own, data.skipped), group=group)
        shares, skipped = zip(*both, strict=True)
    images = [each for share in shares for each in share]
    skipped = {reason: sum(one[reason] for one in skipped) for reason in data.skipped}
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
    """Recalls at 1, 5 and 10 as fractions, text to image and image to text, of the data that `gallery` was read from.

    Scores exist for a few images and all texts at a time. group: that of read_gallery; all its processes return the
    same. ValueError where the samples are no longer those.
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
            for phi in scorer.blocks(batch["image"], texts):
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
    except BadData as error:  # a worker's, with its traceback
        if data.world > 1 and workers < 2 and not data.seen:
            return  # there are more processes than samples
        raise ValueError(f"data: {data.complaint()}") from error


@dataclass(frozen=True, kw_only=True)
class RetrievalOptions(TaskOptions, PairFlags):
    """Image-text retrieval with φ: recall at 1, 5 and 10 as fractions. COCO captions count with all of an image's."""

    data: str
    """Pairs in any form that pacl train takes: .tar shards, csv, a folder, COCO's captions .json, synthetic:eval."""
    scenes: int = 1000
    """Generated scenes of synthetic."""
    plain: bool = False
    """The model's own image embedding beside φ."""
    batch_size: int = 64
    workers: int = 4


def main(argv: Sequence[str], prog: str = "pacl evaluate retrieval") -> int:
    """Run `pacl evaluate retrieval` with these arguments; returns its exit status."""
    options = tyro.cli(RetrievalOptions, args=list(argv), prog=prog)
    data = options.open(options.data, scenes=options.scenes)  # what is wrong with it is said before the model loads
    group = options.group()
    data.rank, data.world = place_in(group)
    towers, embedder = options.load()
    scorers = [Scorer(towers, embedder)] + ([Scorer(towers, plain=True)] if options.plain else [])
    data.transform = towers.transform
    reading = {"batch_size": options.batch_size, "workers": options.workers, "group": group}
    gallery = read_gallery(data, **reading)
    skipped = {reason: count for reason, count in gallery.skipped.items() if count}
    for scorer in scorers:
        found = retrieval(data, gallery, scorer, **reading)
        # CLIP_benchmark names a recall by what is retrieved.
        metrics = {
            f"{what}_retrieval_recall@{k}": found[f"{way}_R@{k}"]
            for what, way in (("image", "text_to_image"), ("text", "image_to_text"))
            for k in RECALLS
        }
        rules = scorer.rules | {"name": f"retrieval {scorer.rules['name']}"}
        counts = {"images": gallery.images, "texts": len(gallery.captions), "skipped": skipped}
        if data.rank == 0:
            options.write("zeroshot_retrieval", Path(options.data).stem, rules, metrics, towers, **counts)
    return 0
