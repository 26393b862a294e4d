"""Image-caption pairs out of webdataset shards, yours or the generated ones.

webdataset walks the tar files; the bytes are decoded here, by suffix. Its own handlers are never called: they unpickle
`.pyd` and `.pkl` members, and its URL opener runs `pipe:` and `http:` addresses through other programs.
"""

from __future__ import annotations

import io
import itertools
import os
import random
import re
import tarfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import braceexpand
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torchvision.transforms.functional import pil_to_tensor
from webdataset.filters import shuffle as shuffle_samples
from webdataset.tariterators import group_by_keys, tar_file_expander

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")  # Pillow reads dozens more, some of which start other programs
REASONS = ("archive", "image", "pixels", "caption", "mask")


class Shards(IterableDataset):
    """Samples of .tar shards: an image (.jpg, .jpeg, .png, .webp), its caption (.txt), perhaps a mask (.mask.png).

    shards: a path, braces and `::` as in open_clip (`a-{000..015}.tar::b.tar`), or a list of such. Local files only.
    transform: from a PIL RGB image to what the sample shall hold; default: uint8 tensor [3, H, W].
    shuffle: samples held for shuffling, 0 for the order of the files; with it the shards change order too.
    seed: the order depends on (seed, epoch, worker) alone. repeat: start over for ever instead of stopping.
    masks: require a mask (uint8 tensor [H, W], a class label per pixel) of the image's size.
    max_image_pixels: larger images are skipped by what their header says, before they are decoded.
    rank, world: this process of how many: each takes its share of the shards, or of the samples where there are fewer
        shards than processes.

    Yields dicts: key (str), image, caption (str), and mask where asked for. A bad sample is skipped and counted:
    `skipped` is a dict of reason to count, shared by all workers, where "archive" counts unreadable stretches of tar
    files. Raises ValueError for no shards or a URL, FileNotFoundError for a missing file, RuntimeError for an epoch
    without one good sample.
    """

    def __init__(
        self,
        shards: str | os.PathLike | Iterable[str | os.PathLike],
        *,
        transform: Callable[[Image.Image], Any] = pil_to_tensor,
        shuffle: int = 0,
        seed: int = 0,
        repeat: bool = False,
        masks: bool = False,
        max_image_pixels: int = 25_000_000,
        rank: int = 0,
        world: int = 1,
    ):
        self.paths = expand_shards(shards)
        self.transform = transform
        self.shuffle = shuffle
        self.seed = seed
        self.repeat = repeat
        self.masks = masks
        self.max_image_pixels = max_image_pixels
        self.rank, self.world = rank, world
        self.start = (0, 1)  # batches that `loader` leaves out, and their size
        # In shared memory, one row per worker: a count that lives in a worker process would be lost with it.
        self._skipped = torch.zeros(len(self.paths), len(REASONS), dtype=torch.int64).share_memory_()

    @property
    def skipped(self) -> dict[str, int]:
        """Reason to number of skipped samples so far, all workers together."""
        return dict(zip(REASONS, self._skipped.sum(0).tolist(), strict=True))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        if workers > self.most_workers:
            raise ValueError(f"workers: got {workers} for {len(self.paths)} shard(s), expected at most one per shard")
        # Workers take turns; the first batch after those left out is that of worker `batches % workers`.
        batches, size = self.start
        worker = (worker + batches) % workers
        samples = self._samples(worker, workers)
        return itertools.islice(samples, size * len(range(worker, batches, workers)), None)

    @property
    def most_workers(self) -> int:
        """Worker processes of which each has a shard to read."""
        return max(1, len(self.paths) // self.world)

    def _samples(self, worker: int, workers: int) -> Iterator[dict[str, Any]]:
        by_shard = len(self.paths) >= self.world
        first, step = (self.rank * workers + worker, self.world * workers) if by_shard else (0, 1)
        for epoch in itertools.count() if self.repeat else range(1):
            order = list(self.paths)
            if self.shuffle:
                random.Random(f"{self.seed} {epoch}").shuffle(order)
            order = order[first::step]
            samples = itertools.chain.from_iterable(self._read(path, worker) for path in order)
            if not by_shard:
                samples = itertools.islice(samples, self.rank, None, self.world)
            if self.shuffle:
                rng = random.Random(f"{self.seed} {epoch} {first}")
                samples = shuffle_samples(self.shuffle, initial=self.shuffle, rng=rng)(samples)
            good = 0
            for sample in samples:
                decoded = self._decode(sample, worker)
                if decoded is not None:
                    good += 1
                    yield decoded
            if good == 0:
                raise RuntimeError(f"shards: no usable sample in {order}, skipped {self.skipped}")

    def _skip(self, reason: str, worker: int) -> None:
        self._skipped[worker, REASONS.index(reason)] += 1

    def _read(self, path: Path, worker: int) -> Iterator[dict[str, bytes]]:
        """Undecoded samples of one shard. One at a time: older webdataset joins samples across a shard's end."""

        def skip(error: Exception) -> bool:
            self._skip("archive", worker)
            return True

        with open(path, "rb") as stream:
            members = tar_file_expander([{"url": str(path), "stream": stream}], handler=skip)
            yield from group_by_keys(members, handler=skip)

    def _decode(self, sample: dict[str, bytes], worker: int) -> dict[str, Any] | None:
        """The sample's image, caption and mask, or None, counted under its reason."""
        reason = "image"
        try:
            data = next(sample[suffix] for suffix in IMAGE_SUFFIXES if suffix in sample)
            with _open(data, IMAGE_FORMATS) as image:
                size = image.size
                if size[0] * size[1] > self.max_image_pixels:
                    self._skip("pixels", worker)
                    return None
                out = {"key": sample["__key__"], "image": self.transform(image.convert("RGB"))}
            reason = "caption"
            out["caption"] = sample["txt"].decode("utf-8").strip()
            if not out["caption"]:
                raise ValueError("empty caption")
            if self.masks:
                reason = "mask"
                with _open(sample["mask.png"], ("PNG",)) as mask:
                    if mask.size != size or mask.mode not in ("L", "P"):
                        raise ValueError("a mask has one byte per pixel and the size of its image")
                    out["mask"] = pil_to_tensor(mask)[0]
            return out
        except Image.DecompressionBombError:  # Pillow's own cap, reached only with max_image_pixels above 179 million
            self._skip("pixels", worker)
        except Exception:  # decoders raise anything on damaged bytes: OSError, SyntaxError, struct.error, ...
            self._skip(reason, worker)
        return None


def _open(data: bytes, formats: tuple[str, ...]) -> Image.Image:
    """Image with its header read and nothing decoded; our own cap replaces Pillow's warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(io.BytesIO(data), formats=formats)


def expand_shards(shards: str | os.PathLike | Iterable[str | os.PathLike]) -> list[Path]:
    """Paths named by `shards` (see Shards), checked to be existing local files."""
    given = [shards] if isinstance(shards, (str, os.PathLike)) else list(shards)
    names = [name for item in given for part in os.fspath(item).split("::") for name in braceexpand.braceexpand(part)]
    if not names:
        raise ValueError("shards: got an empty list, expected paths of .tar files")
    for name in names:
        # Two letters and more: `c:` is a drive. `pipe:` would run a shell, `http:` another program.
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", name):
            raise ValueError(f"shards: got {name!r}, expected the path of a local .tar file; download it first")
        if not Path(name).is_file():
            raise FileNotFoundError(f"shards: {name!r} is not a file, expected the path of a .tar file")
    return [Path(name) for name in names]


def count_samples(paths: Iterable[Path]) -> int:
    """Samples in shards by the names of their members: images that have a caption. Nothing is decoded."""
    total = 0
    for path in paths:
        suffixes: dict[str, set[str]] = {}
        with tarfile.open(path) as tar:
            for member in tar:
                stem, _, suffix = member.name.rpartition("/")[2].partition(".")
                suffixes.setdefault(f"{Path(member.name).parent}/{stem}", set()).add(suffix.lower())
        total += sum("txt" in found and not found.isdisjoint(IMAGE_SUFFIXES) for found in suffixes.values())
    return total


def loader(
    dataset: Shards, batch_size: int, *, workers: int = 0, drop_last: bool = False, start: int = 0
) -> DataLoader:
    """Batches of `dataset` as dicts: tensors stacked, keys and captions in lists.

    workers: processes that read and decode, 0 for this one; no more of them than shards, and a warning says so
    (a worker without a shard would wait for ever under `repeat`). start: leaves out that many batches, which are
    decoded all the same; what follows is what followed them.
    """
    if workers > dataset.most_workers:
        processes = f" and {dataset.world} processes" if dataset.world > 1 else ""
        warnings.warn(
            f"workers: got {workers} for {len(dataset.paths)} shard(s){processes}, using {dataset.most_workers}; "
            "write more shards for more workers",
            stacklevel=2,
        )
        workers = dataset.most_workers
    dataset.start = (start, batch_size)
    return DataLoader(
        dataset, batch_size=batch_size, num_workers=workers, drop_last=drop_last, persistent_workers=workers > 0
    )
