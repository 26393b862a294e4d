"""What all sources of image-caption pairs share: decoding, skipping bad samples, batches, exact resuming.

Bytes are decoded here, whoever read them, by a list of formats: nothing is unpickled and no other program started.
"""

from __future__ import annotations

import atexit
import copy
import functools
import io
import itertools
import os
import signal
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info
from torchvision.transforms.functional import pil_to_tensor

from .images import MAX_IMAGE_PIXELS, TooManyPixels, check_is_file, open_image, to_rgb

REASONS = ("archive", "file", "image", "pixels", "caption", "mask")
MOST_WORKERS = 256  # rows of the counts
LEAST_SEEN = 500  # samples before their bad share says something
MAX_CAPTION_BYTES = 65_536


class BadData(RuntimeError):
    """No usable sample in an epoch, or a larger share of bad ones than allowed."""


class Raw(NamedTuple):
    """A sample that is not decoded yet. A path is opened when its turn comes; image None: there is none, a string: why
    its file may not be read. captions: all of an image that has several, of which caption is one."""

    key: str
    image: bytes | Path | str | None
    caption: bytes | Path | None
    mask: bytes | Path | None = None
    captions: Sequence[str] = ()


class Samples(IterableDataset):
    """Image-caption pairs, in an order that depends on (seed, epoch, rank, worker) alone; base of all sources.

    transform: from a PIL RGB image to what the sample shall hold; default: uint8 tensor [3, H, W].
    shuffle: 0 for the order of the files; samples held for shuffling where they come in streams.
    repeat: start over for ever instead of stopping.
    masks: require a mask (uint8 tensor [H, W], a class label per pixel) of the image's size.
    captions: "one" or "all" of those that an image has.
    max_image_pixels: larger images are skipped by what their header says, before they are decoded.
    max_bad_share: BadData once a larger share of at least 500 samples was skipped, by all workers of this process; with
        several processes none raises it alone, which would leave the others waiting, but all can ask for `too_many`.
    rank, world: this process of how many: each takes its share.

    Yields dicts: key (str), image, caption (str) or captions (list of str, at least one), mask where asked for, worker,
    and place, (epoch, number of the sample in what this worker reads of the epoch). A bad sample is skipped and counted
    under its reason: `skipped`, shared by all workers. "archive" counts unreadable stretches of tar files, "file" what
    is missing or may not be read. An epoch without one good sample is BadData; with `repeat`, one of a worker's share.
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
        captions: Literal["one", "all"] = "one",
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
        self.start = None  # a state of `loader`, to go on from
        self.on_skip: Callable[[str, str, str], None] = _ignore
        # In shared memory, one row per worker: a count that lives in a worker process would be lost with it.
        # The first column counts good samples.
        self._counts = torch.zeros(MOST_WORKERS, 1 + len(REASONS), dtype=torch.int64).share_memory_()

    # What a source provides

    @property
    def most_workers(self) -> int:
        """Worker processes of which each has something to read."""
        raise NotImplementedError

    def count(self) -> int:
        """Pairs in an epoch of all processes, without decoding them."""
        raise NotImplementedError

    def undecoded(self, epoch: int, worker: int, workers: int, start: int = 0) -> Iterator[Raw]:
        """What this worker of this process reads in an epoch, from its sample number `start` on."""
        raise NotImplementedError

    def spread(self, count: int) -> Iterator[Raw]:
        """About `count` samples from all over the source."""
        raise NotImplementedError

    # What they share

    @property
    def skipped(self) -> dict[str, int]:
        """Reason to number of skipped samples so far, all workers together."""
        return dict(zip(REASONS, self._counts[:, 1:].sum(0).tolist(), strict=True))

    @property
    def seen(self) -> int:
        """Samples tried so far, good and bad, all workers together."""
        return int(self._counts.sum())

    @property
    def good(self) -> int:
        """Samples decoded so far, all workers together."""
        return int(self._counts[:, 0].sum())

    @property
    def too_many(self) -> bool:
        """Whether more samples were bad than max_bad_share allows."""
        return self.seen >= LEAST_SEEN and sum(self.skipped.values()) > self.max_bad_share * self.seen

    def complaint(self) -> str:
        """One line on what was skipped so far."""
        skipped, seen = self.skipped, self.seen
        bad = sum(skipped.values())
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in skipped.items() if count) or "none skipped"
        if bad >= seen:
            return f"no usable sample in {self.name} ({reasons})"
        return f"{bad:,} of {seen:,} samples of {self.name} are bad ({reasons}); max_bad_share is {self.max_bad_share}"

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        if workers > self.most_workers:
            raise ValueError(f"workers: got {workers}, expected at most {self.most_workers} for {self.name}")
        epoch = offset = 0
        if self.start is not None:
            # Workers take turns; the first batch after those left out is that of worker `batches % workers`.
            worker = (worker + self.start["batches"]) % workers
            epoch, offset = self.start["places"][worker]
        return self._samples(worker, workers, epoch, offset)

    def _samples(self, worker: int, workers: int, epoch: int, offset: int) -> Iterator[dict[str, Any]]:
        for now in itertools.count(epoch) if self.repeat else range(epoch, 1):
            usable = offset > 0  # what came before was
            for number, raw in enumerate(self.undecoded(now, worker, workers, offset), offset):
                sample = self.decode(raw, worker)
                if sample is not None:
                    usable = True
                    yield sample | {"worker": worker, "place": (now, number)}
            # Without `repeat` the share of another worker may be good; the loader knows when all have ended.
            if not usable and (self.repeat or workers == 1):
                raise BadData(self.complaint())
            offset = 0

    def with_options(self, **changes: Any) -> Samples:
        """A copy with other attributes, such as transform or captions; both count what they skip in one place."""
        other = copy.copy(self)
        for name, value in changes.items():
            if not hasattr(other, name):
                raise TypeError(f"with_options: got {name!r}, which {type(self).__name__} does not have")
            setattr(other, name, value)
        return other

    def turn(self, captions: Sequence[str], epoch: int, key: str) -> int:
        """Number of the caption whose turn it is in this epoch, by (seed, epoch, key); 0 without shuffling."""
        return zlib.crc32(f"{self.seed} {epoch} {key}".encode(errors="replace")) % len(captions) if self.shuffle else 0

    def decode(self, raw: Raw, worker: int = 0) -> dict[str, Any] | None:
        """The sample's key, image, caption and mask, or None, counted under its reason."""
        reason = "file" if isinstance(raw.image, (Path, str)) else "image"
        try:
            with open_source(raw.image) as stream:
                reason = "image"
                with open_image(stream, max_pixels=self.max_image_pixels) as image:
                    size = image.size
                    out = {"key": raw.key, "image": self.transform(to_rgb(image))}
            reason = "caption"
            if self.captions == "one":
                out["caption"] = read_caption(raw.caption)
            else:
                out["captions"] = read_captions(raw)
            if self.masks:
                reason = "mask"
                with open_source(raw.mask) as stream, open_image(stream, ("PNG",), self.max_image_pixels) as mask:
                    if mask.size != size or mask.mode not in ("L", "P"):
                        raise ValueError("a mask has one byte per pixel and the size of its image")
                    out["mask"] = pil_to_tensor(mask)[0]
            self._counts[worker, 0] += 1
            return out
        except Exception as error:  # decoders raise anything on damaged bytes: OSError, SyntaxError, struct.error, ...
            if isinstance(error, TooManyPixels):
                reason = "pixels"
            self.skip(reason, raw.key, error, worker)
        if self.world == 1 and self.too_many:
            raise BadData(self.complaint())
        return None

    def skip(self, reason: str, key: str, error: Exception, worker: int) -> None:
        self._counts[worker, 1 + REASONS.index(reason)] += 1
        self.on_skip(reason, key, " ".join(str(error).split()) or type(error).__name__)


def _ignore(reason: str, key: str, message: str) -> None:
    """A function with a name, because worker processes may be handed the source pickled."""


def read_caption(caption: bytes | Path | None) -> str:
    """Its text, stripped; ValueError for none, an empty one, or one that is not UTF-8."""
    with open_source(caption) as stream:
        data = stream.read(MAX_CAPTION_BYTES + 1)
    if len(data) > MAX_CAPTION_BYTES:
        raise ValueError(f"more than {MAX_CAPTION_BYTES:,} bytes")
    text = data.decode("utf-8-sig").strip()
    if not text:
        raise ValueError("empty caption")
    return text


def read_captions(raw: Raw) -> list[str]:
    """All captions of an image, stripped, without empty ones; ValueError as of read_caption, or where none is left."""
    texts = [text for text in raw.captions if text.strip()]
    return [read_caption(as_bytes(text)) for text in texts] if texts else [read_caption(raw.caption)]


def as_bytes(caption: str) -> bytes:
    """A caption out of JSON, which may hold half a surrogate pair: such bytes are no UTF-8, and the sample is bad."""
    return caption.encode(errors="surrogatepass")


def no_image(image: Image.Image) -> int:
    """A transform for whoever reads captions alone; a function with a name, because it may be pickled."""
    return 0


def readable(name: str) -> str:
    """The name of a file or a member for people: what is not UTF-8 in it could not be printed."""
    return name.encode(errors="replace").decode()


def open_source(source: bytes | Path | str | None) -> BinaryIO:
    if source is None:
        raise ValueError("there is none")
    if isinstance(source, str):
        raise ValueError(source)
    if isinstance(source, bytes):
        return io.BytesIO(source)
    check_is_file(source)
    return open(source, "rb")


class Loader(DataLoader):
    """Batches of Samples. `state`, plain Python, is what `loader` takes to go on after the last batch given out."""

    state: dict[str, Any]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.state = copy.deepcopy(self.dataset.start)
        for batch in super().__iter__():
            epoch, number = (int(x[-1]) for x in batch["place"])
            places = self.state["places"]
            places[self.state["batches"] % len(places)] = [epoch, number + 1]
            self.state["batches"] += 1
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
    """Batches of `dataset` as dicts: tensors stacked, keys and captions in lists, worker and place as tensors [B].

    workers: processes that read and decode, 0 for this one; where the source has less to share (shards), fewer, and a
    warning says so (a worker without a shard would wait for ever under `repeat`). start: the `state` of an earlier
    loader; what follows is what followed there, and what came before is not decoded again. ValueError if that one had
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
        raise ValueError(f"workers: got {workers}, expected as many as where the data order began, {start['workers']}")
    dataset.start = start or {"batches": 0, "workers": workers, "places": [[0, 0]] * places}
    options = {}
    if workers:
        options = {"persistent_workers": True, "worker_init_fn": functools.partial(_outlive_signals, _leaving())}
    options |= {"batch_size": batch_size, "num_workers": workers, "drop_last": drop_last, "collate_fn": _collate}
    return Loader(dataset, **options)


def _collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch as torch makes it, but for lists of captions, which have different lengths."""
    captions = {"captions": [sample.pop("captions") for sample in samples]} if "captions" in samples[0] else {}
    return default_collate(samples) | captions


@functools.cache
def _leaving() -> torch.Tensor:
    """Whether this process is at its end, for the workers of all its loaders: True before multiprocessing ends them."""
    flag = torch.zeros((), dtype=torch.bool).share_memory_()
    atexit.register(flag.fill_, True)
    return flag


def _outlive_signals(leaving: torch.Tensor, worker: int) -> None:
    """SIGTERM and Ctrl-C come to whole groups of processes (torchrun, schedulers, terminals): the main one finishes its
    step and saves, and needs its workers for that. They end when it does."""

    def answer(number, frame):
        if leaving:
            os._exit(0)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, answer)
