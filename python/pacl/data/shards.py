"""Image-caption pairs from webdataset shards.

webdataset groups members to samples. Its decoders are never called, because they unpickle `.pyd` and `.pkl` members;
nor is its URL opener, which runs other programs for `pipe:` and `http:` addresses; nor its reader of tar files, which
believes their headers.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

from webdataset.filters import shuffle as shuffle_samples

from ..files import write_bytes
from ..remote import Location, RemotePath, location, look_up
from ..settings import read_settings
from ..stores import Store
from .archives import contents, members
from .braces import expand_braces
from .members import Group, group_members
from .raw import Raw, as_bytes, readable
from .samples import MOST_WORKERS, Part, Samples, divide

META = re.compile(r"__[^/]*__($|/)")  # names of webdataset's own notes, which are no samples
SIZES = "sizes.json"  # img2dataset's and open_clip's: {"00000.tar": 1000}
ShardNames: TypeAlias = str | os.PathLike | RemotePath | Iterable[str | os.PathLike | RemotePath]
INCOMPLETE = "incomplete.json"  # in a folder whose shards are not all written yet; see pack.py


class Shards(Samples):
    """Samples of .tar shards: an image, a .txt with a caption on each line, perhaps a mask (.mask.png).

    shards: a path, with braces and `::` as in open_clip (`a-{000..015}.tar::b.tar`), or a list of paths. Addresses of
    s3://, gs://, hf:// and https:// are read as local paths are, with the same order; `store` says how.
    resampled: every worker draws shards with replacement, in an epoch as many as its share; needs `repeat`.

    A .json member with a list `captions`, which `pacl data pack` writes for images with several, replaces the .txt.
    `shuffle` also shuffles the shards. A process takes its share of the shards, or of the samples if there are fewer
    shards than processes. Everything else is as in Samples. Raises ValueError for no shards, another scheme or an
    incomplete folder, FileNotFoundError for a missing file. Reading raises StoreError if a store fails: a part of the
    data is never left out for that.
    """

    def __init__(
        self,
        shards: ShardNames,
        *,
        resampled: bool = False,
        store: Store | None = None,
        **options: Any,
    ):
        self.paths = expand_shards(shards, store)
        super().__init__(f"{len(self.paths)} shard(s)", **options)
        if resampled and not self.repeat:
            raise ValueError("resampled: got True without repeat, expected both, because resampling has no end")
        self.resampled = resampled
        self._passed: tuple[int, Any] | None = None  # how far `part` has read a shuffled order, and the rest of it

    @property
    def most_workers(self) -> int:
        return MOST_WORKERS if self.resampled else min(MOST_WORKERS, max(1, len(self.paths) // self.world))

    def count(self) -> int:
        counts = count_shards(self.paths)
        return sum(counts[path] for path in self.paths)  # a path given twice is read twice

    def undecoded(self, epoch: int, worker: int, workers: int, start: int = 0) -> Iterator[Raw]:
        by_shard = self.resampled or len(self.paths) >= self.world
        first, step = (self.rank * workers + worker, self.world * workers) if by_shard else (0, 1)
        order = list(self.paths)
        if self.resampled:
            rng = random.Random(f"{self.seed} {epoch} {first} resampled")
            order = rng.choices(order, k=max(1, len(order) // step))
        else:
            if self.shuffle:
                random.Random(f"{self.seed} {epoch}").shuffle(order)
            order = order[first::step]
        samples: Iterator[Raw] = itertools.chain.from_iterable(self._read(path, worker, epoch) for path in order)
        if not by_shard:
            samples = itertools.islice(samples, self.rank, None, self.world)
        if self.shuffle:
            rng = random.Random(f"{self.seed} {epoch} {first}")
            samples = shuffle_samples(self.shuffle, initial=self.shuffle, rng=rng)(samples)
        return itertools.islice(samples, start, None)

    def parts(self, most: int) -> list[Part]:
        if self.shuffle:
            return super().parts(most)
        counts = count_shards(self.paths)
        return divide([counts[path] for path in self.paths], most)

    def part(self, part: Part) -> Iterator[Raw]:
        if not self.shuffle:
            pieces = (self._piece(self.paths[number], start, stop) for number, start, stop in part.pieces)
            yield from itertools.chain.from_iterable(pieces)
            return
        # A shuffled order cannot be entered in its midst, so reading goes on behind the part before.
        ((_, start, stop),) = part.pieces
        (place, stream), self._passed = self._passed or (start + 1, None), None
        if stream is None or place > start:
            place, stream = 0, self.with_options(rank=0, world=1).undecoded(0, 0, 1)
        yield from itertools.islice(stream, start - place, None if stop is None else stop - place)
        self._passed = None if stop is None else (stop, stream)

    def _piece(self, path: Location, start: int, stop: int | None) -> Iterator[Raw]:
        return itertools.islice(self._read(path, start=start), None if stop is None else stop - start)

    def spread(self, count: int) -> Iterator[Raw]:
        """Yield the first samples of every shard, about `count` in all."""
        each = -(-count // len(self.paths))
        return itertools.chain.from_iterable(itertools.islice(self._read(path), each) for path in self.paths)

    def _read(self, path: Location, worker: int = 0, epoch: int = 0, start: int = 0) -> Iterator[Raw]:
        """Yield the samples of a single shard from number `start` on.

        A single shard, because older webdataset joins samples across the end of a shard. Faults before `start` are not
        counted.
        """
        passed = 0

        def refuse(error: Exception) -> None:
            if passed >= start:
                # The file existed when the run began.
                self.skip("file" if isinstance(error, OSError) else "archive", str(path), error, worker)

        parts = ((name, data) for name, data in contents(path, refuse) if not META.match(name))
        for group in group_members(parts):
            if passed >= start:
                yield _raw(group, epoch, path)
            passed += 1


def _raw(group: Group, epoch: int, path: Location) -> Raw:
    """Return a sample of a shard. Its captions are those in its .json, as `pacl data pack` writes, or in its .txt."""
    parts = group.parts
    captions = _captions(parts.get("json", b"")) or parts.get("txt")
    image = parts[group.image] if group.image else None
    return Raw(readable(group.key), image, captions, parts.get("mask.png"), epoch, group.fault, str(path))


def _captions(notes: bytes) -> list[bytes]:
    """Return the captions in a .json member of `pacl data pack`; [] for any other .json."""
    if b'"captions"' not in notes:
        return []
    try:
        captions = json.loads(notes)["captions"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return []
    texts = isinstance(captions, list) and all(isinstance(text, str) for text in captions)
    return [as_bytes(text) for text in captions] if texts else []


def expand_shards(shards: ShardNames, store: Store | None = None) -> list[Location]:
    """Return the paths that `shards` names (see Shards), all existing files or objects."""
    given = [shards] if isinstance(shards, (str, os.PathLike, RemotePath)) else list(shards)
    names = [name for item in given for part in split_names(item) for name in expand_braces(part)]
    if not names:
        raise ValueError("shards: got an empty list, expected paths of .tar files")
    # webdataset would run a shell for `pipe:` and a program for `http:`; location() refuses them.
    paths = [location(name, store) for name in names]
    look_up(paths)
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"shards: {str(path)!r} is not a file, expected the path of a .tar file")
    for folder in {path.parent for path in paths}:
        check_finished(folder)
    return paths


def split_names(shards: str | os.PathLike | RemotePath) -> list[str]:
    """Return the parts between `::`."""
    return (str(shards) if isinstance(shards, RemotePath) else os.fspath(shards)).split("::")


def check_finished(folder: Location) -> None:
    """Raise ValueError for a folder whose shards are not all written yet: a part must not be taken for the whole."""
    if (folder / INCOMPLETE).is_file():
        raise ValueError(
            f"data: {folder} is incomplete ({INCOMPLETE}), expected a folder with all of its shards; repeat the "
            "command that began to write it"
        )


def count_shards(paths: Iterable[Location]) -> dict[Location, int]:
    """Return the number of samples of each shard, from sizes.json beside it, or counted and then written there.

    An entry is stale if its shard is younger than sizes.json, or too small for so many samples.
    """
    counts: dict[Location, int] = {}
    folders: dict[Location, list[Location]] = {}
    for path in dict.fromkeys(paths):
        folders.setdefault(path.parent, []).append(path)
    for folder, shards in folders.items():
        known = read_sizes(folder)
        written = _time_of(folder / SIZES) if known else 0
        new = {}
        for path in shards:
            count = _known(path, known, written)
            if count is None:
                count, _, whole = count_members(path)
                if whole:
                    new[path.name] = count
            counts[path] = count
        # An unreadable sizes.json belongs to someone else and stays. A read-only folder is no reason to stop.
        if new and known is not None:
            with contextlib.suppress(OSError):
                write_bytes(folder / SIZES, json.dumps(known | new, indent=0, sort_keys=True).encode())
    return counts


def read_sizes(folder: Location) -> dict[str, Any] | None:
    """Read sizes.json of a folder: {} if there is none, None if it is not a JSON object."""
    try:
        return read_settings(folder / SIZES)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        return None


def _time_of(path: Location) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _known(path: Location, sizes: dict[str, Any] | None, written: int) -> int | None:
    """Return the entry of a shard in `sizes`, written at that time; None if there is none or it is stale."""
    try:
        stated = (sizes or {})[path.name]
        count = int(stated) if isinstance(stated, str) else stated
        if type(count) is not int:
            return None
        shard = path.stat()
        younger = shard.st_mtime_ns > written
        # An image and a caption take four blocks of an uncompressed tar file.
        fits = 0 <= count and (path.suffix != ".tar" or count * 2048 <= shard.st_size)
        return count if fits and not younger else None
    except (TypeError, KeyError, ValueError, OSError):
        return None


def count_members(path: Location) -> tuple[int, Counter[str], bool]:
    """Count the samples by the names of a shard's members; also return the bad ones by reason, and whether all of it
    is readable.
    """
    count, faults = 0, Counter[str]()
    refused: list[Exception] = []
    names = ((member.name, b"") for member in members(path, refused.append) if not META.match(member.name))
    for group in group_members(names):
        if group.fault is None:
            count += 1
        else:
            faults[group.fault[0]] += 1
    return count, faults, not refused
