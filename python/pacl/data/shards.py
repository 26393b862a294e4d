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
from pathlib import Path
from typing import Any

from webdataset.filters import shuffle as shuffle_samples

from ..files import write_bytes
from ..settings import read_settings
from .archives import contents, members
from .braces import expand_braces
from .members import Group, group_members
from .raw import Raw, as_bytes, readable
from .samples import MOST_WORKERS, Part, Samples, divide

META = re.compile(r"__[^/]*__($|/)")  # names of webdataset's own notes, which are no samples
SIZES = "sizes.json"  # img2dataset's and open_clip's: {"00000.tar": 1000}
INCOMPLETE = "incomplete.json"  # in a folder whose shards are not all written yet; see pack.py


class Shards(Samples):
    """Samples of .tar shards: an image, a .txt with a caption on each line, perhaps a mask (.mask.png).

    shards: a path, with braces and `::` as in open_clip (`a-{000..015}.tar::b.tar`), or a list of paths. Local files
    only.
    resampled: every worker draws shards with replacement, in an epoch as many as its share; needs `repeat`.

    A .json member with a list `captions`, which `pacl data pack` writes for images with several, replaces the .txt.
    `shuffle` also shuffles the shards. A process takes its share of the shards, or of the samples if there are fewer
    shards than processes. Everything else is as in Samples. Raises ValueError for no shards, a URL or an incomplete
    folder, FileNotFoundError for a missing file.
    """

    def __init__(
        self, shards: str | os.PathLike | Iterable[str | os.PathLike], *, resampled: bool = False, **options: Any
    ):
        self.paths = expand_shards(shards)
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

    def _piece(self, path: Path, start: int, stop: int | None) -> Iterator[Raw]:
        return itertools.islice(self._read(path, start=start), None if stop is None else stop - start)

    def spread(self, count: int) -> Iterator[Raw]:
        """Yield the first samples of every shard, about `count` in all."""
        each = -(-count // len(self.paths))
        return itertools.chain.from_iterable(itertools.islice(self._read(path), each) for path in self.paths)

    def _read(self, path: Path, worker: int = 0, epoch: int = 0, start: int = 0) -> Iterator[Raw]:
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


def _raw(group: Group, epoch: int, path: Path) -> Raw:
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


def expand_shards(shards: str | os.PathLike | Iterable[str | os.PathLike]) -> list[Path]:
    """Return the paths that `shards` names (see Shards), all existing local files."""
    given = [shards] if isinstance(shards, (str, os.PathLike)) else list(shards)
    names = [name for item in given for part in os.fspath(item).split("::") for name in expand_braces(part)]
    if not names:
        raise ValueError("shards: got an empty list, expected paths of .tar files")
    for name in names:
        # Schemes have two letters or more; `c:` is a drive. webdataset runs a shell for `pipe:`, a program for `http:`.
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", name):
            raise ValueError(f"shards: got {name!r}, expected the path of a local .tar file; download it first")
        if not Path(name).is_file():
            raise FileNotFoundError(f"shards: {name!r} is not a file, expected the path of a .tar file")
    for folder in {Path(name).parent for name in names}:
        check_finished(folder)
    return [Path(name) for name in names]


def check_finished(folder: Path) -> None:
    """Raise ValueError for a folder whose shards are not all written yet: a part must not be taken for the whole."""
    if (folder / INCOMPLETE).exists():
        raise ValueError(
            f"data: {folder} is incomplete ({INCOMPLETE}), expected a folder with all of its shards; repeat the "
            "command that began to write it"
        )


def count_shards(paths: Iterable[Path]) -> dict[Path, int]:
    """Return the number of samples of each shard, from sizes.json beside it, or counted and then written there.

    An entry is stale if its shard is younger than sizes.json, or too small for so many samples.
    """
    counts: dict[Path, int] = {}
    folders: dict[Path, list[Path]] = {}
    for path in dict.fromkeys(paths):
        folders.setdefault(path.parent, []).append(path)
    for folder, shards in folders.items():
        known = read_sizes(folder)
        new = {}
        for path in shards:
            count = _known(path, known)
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


def read_sizes(folder: Path) -> dict[str, Any] | None:
    """Read sizes.json of a folder: {} if there is none, None if it is not a JSON object."""
    try:
        return read_settings(folder / SIZES)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        return None


def _known(path: Path, sizes: dict[str, Any] | None) -> int | None:
    """Return the entry of a shard in `sizes`; None if there is none or it is stale."""
    try:
        stated = (sizes or {})[path.name]
        count = int(stated) if isinstance(stated, str) else stated
        if type(count) is not int:
            return None
        shard = path.stat()
        younger = shard.st_mtime_ns > (path.parent / SIZES).stat().st_mtime_ns
        # An image and a caption take four blocks of an uncompressed tar file.
        fits = 0 <= count and (path.suffix != ".tar" or count * 2048 <= shard.st_size)
        return count if fits and not younger else None
    except (TypeError, KeyError, ValueError, OSError):
        return None


def count_members(path: Path) -> tuple[int, Counter[str], bool]:
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
