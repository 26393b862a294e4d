"""Pack any source of pairs into shards; images are copied byte for byte."""

from __future__ import annotations

import bisect
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from webdataset import TarWriter

from ..annotations import checked
from ..files import atomic_writer, remove_unfinished, write_bytes
from ..locks import lock_folder
from ..settings import read_settings
from .flags import check_plan
from .images import open_image
from .raw import open_source, read_captions
from .samples import Samples
from .scene_shards import Members, shard_sizes
from .shards import INCOMPLETE, SIZES

PACKED = "packed.json"  # what incomplete.json becomes: the plan, and how far each shard goes


def pack(
    source: Samples,
    out: Path,
    *,
    shard_size: int = 10_000,
    plan: dict[str, Any] | None = None,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, int]:
    """Write the good samples of `source` as `out/00000.tar`, ..., and sizes.json; return the sizes.

    Every sample is decoded once, to leave out bad ones (`source.skipped`), and its bytes are copied. All shards take
    equally many samples of the source, at most `shard_size`, so that none is left with a few; bad ones among them make
    a shard smaller, and a shard without a good one is not written. Members are numbered. Their .json holds the source's
    `key` and, for an image with several captions, `captions`; .txt is the first of them. progress: called once per
    sample.

    While it works, `out` has incomplete.json, which makes all readers refuse the folder. After an interruption, the
    same call keeps the finished shards and ends with the same bytes; once finished, it changes nothing. plan: plain
    Python that identifies `source`, to be the same then. Raises ValueError if `out` has shards of anything else, or for
    a `shard_size` below 1.
    """
    if shard_size < 1:
        raise ValueError(f"shard_size: got {shard_size}, expected at least 1")
    plan = {"source": source.name, "seed": source.seed, "shuffle": source.shuffle, "masks": source.masks} | (plan or {})
    plan["shard_size"] = shard_size
    with lock_folder(out):
        remove_unfinished(out)
        if (out / PACKED).exists():
            shards, finished = _read_notes(out / PACKED, plan)
            if finished:
                return _sizes(shards)
        if (out / INCOMPLETE).exists():
            shards, _ = _read_notes(out / INCOMPLETE, plan)
        elif any(out.glob("*.tar")) or (out / SIZES).exists():
            raise ValueError(f"out: {out} has shards already, expected a folder without any")
        else:
            shards = []
            _note(out, plan, shards)
        place = shards[-1] if shards else {"end": 0, "read": 0}
        samples = _members(source, progress, number=place["end"], read=place["read"])
        ends = list(itertools.accumulate(shard_sizes(source.count(), shard_size)))

        def share(sample: _Sample) -> int:
            """Return the number of the source's share that a sample is in; it may have more samples than it counts."""
            more = sample.read - (ends[-1] if ends else 0)
            return bisect.bisect_left(ends, sample.read) if more <= 0 else len(ends) + (more - 1) // shard_size

        for number, (_, group) in enumerate(itertools.groupby(samples, share), len(shards)):
            with atomic_writer(out / _name(number)) as file:
                with TarWriter(file, encoder=False, mtime=0) as tar:
                    for last in group:
                        tar.write(last.members)
                shards.append({"end": last.number + 1, "read": last.read})
                _note(out, plan, shards)  # before the shard gets its name, so that every shard has its note
        sizes = _sizes(shards)
        if sizes:
            write_bytes(out / SIZES, json.dumps(sizes, indent=0).encode())
            os.replace(out / INCOMPLETE, out / PACKED)
        else:
            (out / INCOMPLETE).unlink()
    return sizes


def _read_notes(path: Path, plan: dict[str, Any]) -> tuple[list[dict[str, int]], bool]:
    """Return the notes on the shards that are there, and whether these are all that `path` notes.

    end: pairs in the shard and those before it. read: samples of the source read for them, bad ones too.
    """
    try:
        notes = checked(read_settings(path), _Notes, path)
        begun, shards = notes["plan"], [{"end": x["end"], "read": x["read"]} for x in notes["shards"]]
    except ValueError as error:
        raise ValueError(f"out: {path} is damaged, expected notes of `pacl data pack`; delete {path.parent}") from error
    check_plan(path.parent, begun, plan)
    there = list(itertools.takewhile(lambda number: (path.parent / _name(number)).is_file(), range(len(shards))))
    return shards[: len(there)], len(there) == len(shards)


def bad_before(out: Path) -> int:
    """Return how many samples before the last good one were bad, those of earlier calls for the same `out` included."""
    last = read_settings(out / PACKED)["shards"][-1]
    return last["read"] - last["end"]


def _sizes(shards: list[dict[str, int]]) -> dict[str, int]:
    ends = [0, *(shard["end"] for shard in shards)]
    return {_name(i): end - start for i, (start, end) in enumerate(itertools.pairwise(ends))}


def _note(out: Path, plan: dict[str, Any], shards: list[dict[str, int]]) -> None:
    write_bytes(out / INCOMPLETE, json.dumps({"plan": plan, "shards": shards}, indent=1).encode())


def _name(number: int) -> str:
    return f"{number:05d}.tar"


class _Shard(TypedDict):
    end: int
    read: int


class _Notes(TypedDict):
    plan: dict[str, Any]
    shards: list[_Shard]


class _Sample(NamedTuple):
    """A good sample of the source. number: its place among these. read: samples read up to it, bad ones too."""

    number: int
    read: int
    members: Members


def _members(source: Samples, progress: Callable[[], None], number: int, read: int) -> Iterator[_Sample]:
    """Yield the good samples of the source after the first `read`, numbered from `number` on."""
    for now, raw in enumerate(source.undecoded(0, 0, 1, read), read + 1):
        progress()
        if source.decode(raw) is None:
            continue
        captions, _ = read_captions(raw.captions)
        text = " ".join(captions[0].splitlines())  # each line would be a caption
        notes = {"key": raw.key} | ({"captions": captions} if captions != [text] else {})
        image = _read(raw.image)
        members: Members = {"__key__": f"{number:09d}", _suffix(image): image}
        members |= {"txt": text.encode(), "json": json.dumps(notes).encode()}
        yield _Sample(number, now, members | ({"mask.png": _read(raw.mask)} if source.masks else {}))
        number += 1


def _read(data: bytes | Path | str | None) -> bytes:
    with open_source(data) as stream:
        return stream.read()


def _suffix(image: bytes) -> str:
    """Return the suffix of an image by its content, not by the name of its file."""
    with open_image(image, max_pixels=sys.maxsize) as opened:
        return str(opened.format).lower().replace("jpeg", "jpg").replace("mpo", "jpg")
