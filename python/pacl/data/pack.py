"""Pack any source of pairs into shards; images are copied byte for byte."""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch.distributed as dist
from webdataset import TarWriter

from ..annotations import checked
from ..files import atomic_writer, remove_unfinished, write_bytes
from ..locks import lock_folder
from ..processes import from_first, gather_objects, place_in
from ..settings import read_settings
from .flags import check_plan
from .images import open_image
from .parts import block
from .raw import Raw, open_source, read_captions
from .samples import Part, Samples
from .scene_shards import Members
from .shards import INCOMPLETE, SIZES

PACKED = "packed.json"  # what incomplete.json becomes: the plan, and how far each shard goes


def pack(
    source: Samples,
    out: Path,
    *,
    shard_size: int = 10_000,
    plan: dict[str, Any] | None = None,
    progress: Callable[[], None] = lambda: None,
    group: dist.ProcessGroup | None = None,
) -> dict[str, int]:
    """Write the good samples of `source` as `out/00000.tar`, ..., and sizes.json; return the sizes.

    Every sample is decoded once, to leave out bad ones (`source.skipped`), and its bytes are copied. All shards take
    equally many samples of the source, at most `shard_size`, so that none is left with a few; bad ones among them make
    a shard smaller, and a shard without a good one is not written. Members are numbered by their places in the source.
    Their .json holds the source's `key` and, for an image with several captions, `captions`; .txt is the first of them.
    progress: called once per sample. group: processes that share the shards; all return the same.

    While it works, `out` has incomplete.json, which makes all readers refuse the folder. After an interruption, the
    same call keeps the finished shards and ends with the same bytes; once finished, it changes nothing. plan: plain
    Python that identifies `source`, to be the same then. Raises ValueError if `out` has shards of anything else, or for
    a `shard_size` below 1.
    """
    if shard_size < 1:
        raise ValueError(f"shard_size: got {shard_size}, expected at least 1")
    plan = {"source": source.name, "seed": source.seed, "shuffle": source.shuffle, "masks": source.masks} | (plan or {})
    plan["shard_size"] = shard_size
    rank, world = place_in(group)
    with contextlib.ExitStack() as stack:
        from_first(lambda: stack.enter_context(lock_folder(out)), group)
        sizes, missing = from_first(lambda: _begin(source, out, plan), group)
        if sizes is not None:
            return sizes
        for number, part in block(missing, rank, world):
            _write(source, out, number, part, progress)
        gather_objects(rank, group)  # all have finished
        return from_first(lambda: _finish(out), group)


def _begin(source: Samples, out: Path, plan: dict[str, Any]) -> tuple[dict[str, int] | None, list[tuple[int, Part]]]:
    """Return the sizes of a folder that is finished, or None and the parts of the source that are to be written."""
    remove_unfinished(out)
    if (out / PACKED).exists():
        shards = _read_notes(out / PACKED, plan)["shards"]
        sizes = _sizes(shards)
        if all((out / name).is_file() for name in sizes):
            _remove_notes(out)
            return sizes, []
    samples = source.count()
    if (out / INCOMPLETE).exists():
        notes = _read_notes(out / INCOMPLETE, plan)
        if "samples" not in notes:
            raise ValueError(
                f"out: {out} was begun by an earlier version, which numbered the pairs otherwise; delete it"
            )
        check_plan(out, notes, {"samples": samples})
    elif any(out.glob("*.tar")) or (out / SIZES).exists():
        raise ValueError(f"out: {out} has shards already, expected a folder without any")
    else:
        write_bytes(out / INCOMPLETE, _json({"plan": plan, "samples": samples, "shards": []}))
    parts = source.parts(plan["shard_size"])
    return None, [(number, part) for number, part in enumerate(parts) if not _is_written(out, number)]


def _write(source: Samples, out: Path, number: int, part: Part, progress: Callable[[], None]) -> None:
    """Write the shard of a part, unless all of its samples are bad, and before it gets its name a note on it."""
    read = good = 0

    def members() -> Iterator[Members]:
        nonlocal read, good
        for raw in source.part(part):
            progress()
            read += 1
            if source.decode(raw) is not None:
                good += 1
                yield _members(source, raw, part.first + read - 1)

    def note() -> None:
        write_bytes(_note(out, number), _json({"good": good, "read": read}))

    found = members()
    if (first := next(found, None)) is None:
        note()
        return
    with atomic_writer(out / _name(number)) as file:
        with TarWriter(file, encoder=False, mtime=0) as tar:
            for each in itertools.chain([first], found):
                tar.write(each)
        note()


def _finish(out: Path) -> dict[str, int]:
    """Write sizes.json and packed.json, and remove the notes that make readers refuse the folder; return the sizes."""
    notes: dict[str, Any] = dict(read_settings(out / INCOMPLETE))
    shards: list[dict[str, Any]] = []
    end = read = number = 0
    while _note(out, number).exists():
        counts = checked(read_settings(_note(out, number)), _Counts, _note(out, number))
        end, read = end + counts["good"], read + counts["read"]
        if counts["good"]:
            shards.append({"name": _name(number), "end": end, "read": read})
        number += 1
    sizes = _sizes(shards)
    if sizes:
        write_bytes(out / SIZES, json.dumps(sizes, indent=0).encode())
        write_bytes(out / PACKED, _json(notes | {"shards": shards}))
    _remove_notes(out)
    return sizes


def _remove_notes(out: Path) -> None:
    """Remove the notes on the parts and then incomplete.json, so that no note is left for another start."""
    for path in out.glob("incomplete-*.json"):
        path.unlink()
    (out / INCOMPLETE).unlink(missing_ok=True)


def _read_notes(path: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """Return the notes on a folder, begun with the same plan."""
    try:
        notes = checked(read_settings(path), _Notes, path)
    except ValueError as error:
        raise ValueError(f"out: {path} is damaged, expected notes of `pacl data pack`; delete {path.parent}") from error
    check_plan(path.parent, notes["plan"], plan)
    return notes


def _is_written(out: Path, number: int) -> bool:
    """Return True for a part that needs no more work: its shard is there, or it has no good sample."""
    path = _note(out, number)
    return path.exists() and (
        not checked(read_settings(path), _Counts, path)["good"] or (out / _name(number)).is_file()
    )


def bad_before(out: Path) -> int:
    """Return how many samples before the last good one were bad, those of earlier calls for the same `out` included."""
    last = read_settings(out / PACKED)["shards"][-1]
    return last["read"] - last["end"]


def _sizes(shards: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return the size of each shard by its name, which earlier versions did not note."""
    ends = [0, *(shard["end"] for shard in shards)]
    names = [shard.get("name", _name(number)) for number, shard in enumerate(shards)]
    return {name: end - start for name, (start, end) in zip(names, itertools.pairwise(ends), strict=True)}


def _json(values: dict[str, Any]) -> bytes:
    return json.dumps(values, indent=1).encode()


def _name(number: int) -> str:
    return f"{number:05d}.tar"


def _note(out: Path, number: int) -> Path:
    return out / f"incomplete-{number:05d}.json"


class _Shard(TypedDict):
    """A shard. end, read: the good samples up to its end, and all those read up to there, bad ones too."""

    end: int
    read: int


class _Notes(TypedDict):
    plan: dict[str, Any]
    shards: list[_Shard]


class _Counts(TypedDict):
    """A note on a part of the source: its good samples, and all of its samples."""

    good: int
    read: int


def _members(source: Samples, raw: Raw, number: int) -> Members:
    """Return the members of a good sample."""
    captions, _ = read_captions(raw.captions)
    text = " ".join(captions[0].splitlines())  # each line would be a caption
    notes = {"key": raw.key} | ({"captions": captions} if captions != [text] else {})
    image = _read(raw.image)
    members: Members = {"__key__": f"{number:09d}", _suffix(image): image}
    members |= {"txt": text.encode(), "json": json.dumps(notes).encode()}
    return members | ({"mask.png": _read(raw.mask)} if source.masks else {})


def _read(data: bytes | Path | str | None) -> bytes:
    with open_source(data) as stream:
        return stream.read()


def _suffix(image: bytes) -> str:
    """Return the suffix of an image by its content, not by the name of its file."""
    with open_image(image, max_pixels=sys.maxsize) as opened:
        return str(opened.format).lower().replace("jpeg", "jpg").replace("mpo", "jpg")
