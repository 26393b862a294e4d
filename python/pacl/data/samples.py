"""The base of all sources of image-caption pairs: decoding, skipping bad samples, batches, exact resuming.

A sample is one image with one or more captions, whatever the source: rows of a csv with the same path, lines of a .txt
file, a list in a .json member or COCO's annotations of one image are captions of one sample. Training draws one caption
of an image per epoch, or several, by seed, epoch and key; retrieval, validation and features use all of them. A pair is
an image with one of its captions. Parts without an image or a caption are not samples; they are skipped and counted by
reason.

All sources decode their bytes here, by a list of formats: nothing is unpickled and no other program is started.
"""

from __future__ import annotations

import copy
import itertools
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image
from torch.utils.data import IterableDataset, default_collate, get_worker_info
from torchvision.transforms.functional import pil_to_tensor

from ..failures import sentence
from ..resolution import join_images
from .images import MAX_IMAGE_PIXELS, TooManyPixels, UnreadFormat, open_image, read_image
from .raw import Raw, open_source, read_captions
from .readers import ReaderLoader, worker_options
from .scene_shards import shard_sizes

REASONS = ("archive", "row", "file", "image", "format", "pixels", "caption", "apart", "mask")
MOST_WORKERS = 256  # rows of the counts
LEAST_SEEN = 500  # samples after which the share of bad ones is meaningful


class BadData(RuntimeError):
    """No usable sample in an epoch, or a larger share of bad ones than allowed."""


class Part(NamedTuple):
    """A part of an epoch, the same for any number of processes and workers.

    first, size: number of its first sample, and of its samples. pieces: file, first sample in it, and the one after
    the last, or None if the part holds all that follow.
    """

    first: int
    size: int
    pieces: list[tuple[int, int, int | None]]


def divide(counts: Sequence[int], most: int) -> list[Part]:
    """Divide files with so many samples into parts of at most `most`, whose sizes differ by 1 at most.

    Samples that a file has beyond its count belong to the part with its end.
    """
    parts: list[Part] = []
    file = place = first = 0
    for size in shard_sizes(sum(counts), most) or [0]:
        pieces: list[tuple[int, int, int | None]] = []
        left = size
        while file < len(counts) and (left or place == counts[file]):
            start, place = place, min(counts[file], place + left)
            left -= place - start
            pieces.append((file, start, None if place == counts[file] else place))
            if place == counts[file]:
                file, place = file + 1, 0
        parts.append(Part(first, size, pieces))
        first += size
    return parts


class Samples(IterableDataset):
    """Base of all sources: image-caption pairs in an order that depends on (seed, epoch, rank, worker) alone.

    transform: function of a PIL RGB image that gives the sample's image; default: uint8 tensor [3, H, W].
    shuffle: 0 for the order of the files; for streams, the number of samples held for shuffling.
    repeat: start over for ever instead of stopping.
    masks: require a mask (uint8 tensor [H, W], a class label per pixel) of the image's size.
    captions: "one", "all", or at most so many different captions of an image.
    max_image_pixels: skip larger images, by their header, before decoding.
    max_bad_share: raise BadData when a larger share of the samples is bad, once all workers of this process together
        have read 500. With several processes none raises alone, because the others would wait; all can read `too_many`.
    rank, world: index and number of the processes; each takes its share.

    Yields dicts: key and origin (str; together they name the image), image, caption (str) or, unless `captions` is
    "one", captions (list of str, at least one), mask if required, worker, and place (epoch, index of the sample among
    those that this worker reads in the epoch). A bad sample is skipped and counted by its reason in `skipped`, shared
    by all workers: "archive" counts unreadable parts of tar files, "row"
    rows of a csv with too many or too few fields, "file" files that are missing or may not be read, "format" images in
    a format that is not read, and "apart" images and texts of a shard that are not adjacent. A bad caption of an image
    that has others is counted too, and the others are used. Raises BadData for an epoch without a good sample; with
    `repeat`, for such a share of one worker.
    """

    def __init__(
        self,
        name: str,
        *,
        transform: Callable[[Image.Image], Any] = pil_to_tensor,
        shuffle: int = 0,
        seed: int = 0,
        repeat: bool = False,
        masks: bool = False,
        captions: Literal["one", "all"] | int = "one",
        max_image_pixels: int = MAX_IMAGE_PIXELS,
        max_bad_share: float = 0.1,
        rank: int = 0,
        world: int = 1,
    ):
        self.name = name
        self.transform = transform
        self.shuffle = shuffle
        self.seed = seed
        self.repeat = repeat
        self.masks = masks
        self.captions = captions
        self.max_image_pixels = max_image_pixels
        self.max_bad_share = max_bad_share
        self.rank, self.world = rank, world
        self.start: dict[str, Any] | None = None  # a state of `loader` to continue from
        self.on_skip: Callable[[str, str, str], None] = _ignore
        # One row per worker; the first column counts good samples. Shared memory outlives a worker.
        self.counts = torch.zeros(MOST_WORKERS, 1 + len(REASONS), dtype=torch.int64).share_memory_()

    # Each source provides these

    @property
    def most_workers(self) -> int:
        """The largest number of worker processes with samples for each."""
        raise NotImplementedError

    def count(self) -> int:
        """Return the number of pairs in an epoch of all processes, without decoding."""
        raise NotImplementedError

    def undecoded(self, epoch: int, worker: int, workers: int, start: int = 0) -> Iterator[Raw]:
        """Yield the samples that this worker of this process reads in an epoch, from sample number `start` on."""
        raise NotImplementedError

    def spread(self, count: int) -> Iterator[Raw]:
        """Yield about `count` samples from all over the source."""
        raise NotImplementedError

    # All sources share the rest, but for `parts` and `part`, which shards find faster

    def parts(self, most: int) -> list[Part]:
        """Divide an epoch of all processes into as few parts as hold at most `most` samples each, of equal size."""
        return divide([self.count()], most)

    def part(self, part: Part) -> Iterator[Raw]:
        """Yield the samples of one of `parts`, whatever the process; bad ones are still among them."""
        ((_, start, stop),) = part.pieces
        whole = self.with_options(rank=0, world=1)
        return itertools.islice(whole.undecoded(0, 0, 1, start), None if stop is None else stop - start)

    @property
    def skipped(self) -> dict[str, int]:
        """Number of skipped samples so far by reason, all workers together."""
        return dict(zip(REASONS, self.counts[:, 1:].sum(0).tolist(), strict=True))

    @property
    def reasons(self) -> str:
        """`skipped` as text, "none" if nothing was skipped."""
        return ", ".join(f"{reason} {count:,}" for reason, count in self.skipped.items() if count) or "none"

    @property
    def seen(self) -> int:
        """Samples tried so far, good and bad, all workers together."""
        return int(self.counts.sum())

    @property
    def good(self) -> int:
        """Samples decoded so far, all workers together."""
        return int(self.counts[:, 0].sum())

    @property
    def too_many(self) -> bool:
        """True if the share of bad samples exceeds max_bad_share."""
        return self.seen >= LEAST_SEEN and sum(self.skipped.values()) > self.max_bad_share * self.seen

    def complaint(self) -> str:
        """Return a line on the samples skipped so far."""
        bad = sum(self.skipped.values())
        if not self.good:
            return f"no usable sample in {self.name} ({self.reasons})"
        found = f"{bad:,} of {self.seen:,} samples of {self.name} are bad ({self.reasons})"
        return f"{found}; max_bad_share is {self.max_bad_share}"

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        if workers > self.most_workers:
            raise ValueError(f"workers: got {workers}, expected at most {self.most_workers} for {self.name}")
        epoch = offset = 0
        if self.start is not None:
            # Workers take turns, so the next one is worker `batches % workers`.
            worker = (worker + self.start["batches"]) % workers
            epoch, offset = self.start["places"][worker]
        return self._samples(worker, workers, epoch, offset)

    def _samples(self, worker: int, workers: int, epoch: int, offset: int) -> Iterator[dict[str, Any]]:
        for now in itertools.count(epoch) if self.repeat else range(epoch, 1):
            usable = offset > 0  # the earlier samples of the epoch were usable
            raws = self.undecoded(now, worker, workers, offset)
            for number, sample in enumerate(self.decoded(raws, worker), offset):
                if sample is not None:
                    usable = True
                    yield sample | {"worker": worker, "place": (now, number)}
            # Without `repeat` another worker may have good samples; the loader checks at the end of all.
            if not usable and (self.repeat or workers == 1):
                raise BadData(self.complaint())
            offset = 0

    def decoded(self, raws: Iterator[Raw], worker: int) -> Iterator[dict[str, Any] | None]:
        """Decode samples in their order; None for a bad one."""
        return (self.decode(raw, worker) for raw in raws)

    def with_options(self, **changes: Any) -> Samples:
        """Return a copy with other attributes, such as transform or captions; the copies share their counts.

        Raises TypeError for an unknown attribute.
        """
        other = copy.copy(self)
        for name, value in changes.items():
            if not hasattr(other, name):
                raise TypeError(f"with_options: got {name!r}, expected an attribute of {type(self).__name__}")
            setattr(other, name, value)
        return other

    def remarks(self) -> list[str]:
        """Return a line on each kind of thing that was left out or repaired when the source was opened."""
        return []

    def turns(self, captions: Sequence[str], epoch: int, key: str) -> list[int]:
        """Return the indices of the captions to take in this epoch.

        The first one depends on (seed, epoch, key); it is 0 without shuffling. The others are those that follow it, as
        in a circle, without texts that were taken already.
        """
        if self.captions == "all":
            return list(range(len(captions)))
        number = zlib.crc32(f"{self.seed} {epoch} {key}".encode(errors="replace")) if self.shuffle else 0
        most = 1 if self.captions == "one" else self.captions
        chosen: dict[str, int] = {}
        for place in range(number, number + len(captions)):
            if len(chosen) == most:
                break
            chosen.setdefault(captions[place % len(captions)], place % len(captions))
        return list(chosen.values())

    def decode(self, raw: Raw, worker: int = 0) -> dict[str, Any] | None:
        """Decode a sample into key, image, caption and mask; return None for a bad one, counted by its reason."""
        reason = "file" if isinstance(raw.image, (Path, str)) else "image"
        try:
            if raw.fault is not None:
                reason, message = raw.fault
                raise ValueError(message)
            with open_source(raw.image) as stream:
                reason = "image"
                # An image with a mask stays as stored, because masks are drawn on the stored pixels.
                image = read_image(stream, self.max_image_pixels, turn=not self.masks)
                out = {"key": raw.key, "origin": raw.origin, "image": self.transform(image)}
            reason = "caption"
            captions, bad = read_captions(raw.captions)
            captions = [captions[turn] for turn in self.turns(captions, raw.epoch, raw.key)]
            out |= {"caption": captions[0]} if self.captions == "one" else {"captions": captions}
            if self.masks:
                reason = "mask"
                with open_source(raw.mask) as stream, open_image(stream, ("PNG",), self.max_image_pixels) as mask:
                    if mask.size != image.size or mask.mode not in ("L", "P"):
                        found = f"{mask.width} x {mask.height} {mask.mode}"
                        raise ValueError(f"got a mask of {found}, expected {image.size}, one byte per pixel")
                    out["mask"] = pil_to_tensor(mask)[0]
            for error in bad:
                self.skip("caption", raw.key, error, worker)
            self.counts[worker, 0] += 1
            return out
        except Exception as error:  # on damaged bytes decoders raise OSError, SyntaxError, struct.error, ...
            if isinstance(error, TooManyPixels):
                reason = "pixels"
            if isinstance(error, UnreadFormat) and reason == "image":
                reason = "format"
            self.skip(reason, raw.key, error, worker)
        if self.world == 1 and self.too_many:
            raise BadData(self.complaint())
        return None

    def skip(self, reason: str, key: str, error: Exception, worker: int) -> None:
        self.counts[worker, 1 + REASONS.index(reason)] += 1
        self.on_skip(reason, key, sentence(error))


def _ignore(reason: str, key: str, message: str) -> None:
    """Do nothing. A named function, because the source may be pickled for worker processes."""


def no_image(image: Image.Image) -> int:
    """Return 0: a transform for readers of captions alone. A named function, because it may be pickled."""
    return 0


class Loader(ReaderLoader):
    """Batches of Samples. `state`, plain Python, lets `loader` continue after the last batch given out."""

    dataset: Samples
    state: dict[str, Any]

    # mypy: a generator in place of torch's own iterator class.
    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        assert self.dataset.start is not None  # set by `loader`
        self.state = copy.deepcopy(self.dataset.start)
        for batch in self.watched():
            epoch, number = (int(x[-1]) for x in batch["place"])
            places, worker = self.state["places"], int(batch["worker"][-1])
            places[worker] = [epoch, number + 1]
            # Workers take turns, and one whose samples are all read loses its turn.
            self.state["batches"] += 1 + (worker - self.state["batches"]) % len(places)
            yield batch
        if not self.state["batches"] and not self.dataset.good:
            raise BadData(self.dataset.complaint())


def loader(
    dataset: Samples,
    batch_size: int,
    *,
    workers: int = 0,
    drop_last: bool = False,
    start: dict[str, Any] | None = None,
) -> Loader:
    """Return batches of `dataset` as dicts: tensors are stacked, keys and captions are lists, worker and place are [B].

    workers: processes that read and decode, 0 for this one. If the source has fewer shards, fewer are used, with a
    warning, because under `repeat` a worker without a shard would wait for ever. start: the `state` of an earlier
    loader; its next batches follow, and earlier ones are not decoded again. Raises ValueError if the earlier loader had
    another number of workers.
    """
    if workers > dataset.most_workers:
        processes = f" and {dataset.world} processes" if dataset.world > 1 else ""
        warnings.warn(
            f"workers: got {workers} for {dataset.name}{processes}, using {dataset.most_workers}; "
            "write more shards for more workers",
            stacklevel=2,
        )
        workers = dataset.most_workers
    places = max(1, workers)
    if start is not None and len(start["places"]) != places:
        raise ValueError(f"workers: got {workers}, expected {start['workers']} as in the run that is resumed")
    dataset.start = start or {"batches": 0, "workers": workers, "places": [[0, 0]] * places}
    made = Loader(dataset, batch_size, drop_last=drop_last, collate_fn=collate, **worker_options(workers))
    made.state = copy.deepcopy(dataset.start)
    return made


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Collate a batch as torch does, except for captions, images, texts and packed tokens that differ in size."""
    several: dict[str, Any] = join_images(samples)
    if "length" in samples[0]:
        several["tokens"] = torch.cat([sample.pop("tokens") for sample in samples])
    if "captions" in samples[0]:
        several["captions"] = [sample.pop("captions") for sample in samples]
    if "texts" in samples[0]:
        several["texts"] = torch.cat([sample.pop("texts") for sample in samples])
    return default_collate(samples) | several


def captions_of(batch: dict[str, Any]) -> list[list[str]]:
    """Return the captions of each image of a batch."""
    return batch["captions"] if "captions" in batch else [[caption] for caption in batch["caption"]]
