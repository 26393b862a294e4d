"""Image-text retrieval among the pairs of a source, streamed: every image is read once per score and kept never."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image

from ..data.samples import BadData, Samples, loader
from ..progress import Progress
from ..training.features import SEPARATOR, all_captions
from .retrieval import Retrieval
from .scorer import Scorer


@dataclass(frozen=True)
class Gallery:
    """captions: of all images, one after the other; owners: the image of each, from 0."""

    captions: list[str]
    owners: list[int]

    @property
    def images(self) -> int:
        return self.owners[-1] + 1


def read_gallery(data: Samples, *, batch_size: int = 64, workers: int = 0) -> Gallery:
    """All captions of every image of `data`, which is then ready for `retrieval` with the same batch size and
    workers, by which samples come in another order. ValueError without a usable pair.
    """
    data.choose = all_captions
    transform, data.transform = data.transform, _nothing
    captions, owners = [], []
    image = 0
    for batch in _read(data, batch_size, workers):
        for given in batch["caption"]:
            each = _split(given)
            captions += each
            owners += [image] * len(each)
            image += 1
    data.transform = transform
    return Gallery(captions, owners)


def retrieval(
    data: Samples, gallery: Gallery, scorer: Scorer, *, batch_size: int = 64, workers: int = 0
) -> dict[str, float]:
    """Recalls at 1, 5 and 10 as fractions, text to image and image to text, of the data that `gallery` was read from.

    Scores exist for a few images and all texts at a time. ValueError where the samples are no longer those.
    """
    texts = scorer.towers.embed(gallery.captions)
    result = Retrieval(gallery.captions, None, None, scorer.device, gallery.owners)
    at = text = 0
    with Progress(f"retrieval {scorer.rules['name']}", gallery.images, "image") as progress:
        for batch in _read(data, batch_size, workers):
            found = [caption for given in batch["caption"] for caption in _split(given)]
            if found != gallery.captions[text : text + len(found)]:
                raise ValueError("data: its samples changed while they were read")
            text += len(found)
            for phi in scorer.blocks(batch["image"], texts):
                result.update(phi, at)
                at += len(phi)
            for _ in batch["key"]:
                progress.step()
    if at != gallery.images:
        raise ValueError("data: its samples changed while they were read")
    return result.values()


def _read(data: Samples, batch_size: int, workers: int) -> Iterator[dict]:
    try:
        yield from loader(data, batch_size, workers=min(workers, data.most_workers))
    except BadData as error:  # a worker's, with its traceback
        raise ValueError(f"data: {data.complaint()}") from error


def _split(given: str) -> list[str]:
    return [text.strip() for text in given.split(SEPARATOR) if text.strip()]


def _nothing(image: Image.Image) -> int:
    return 0
