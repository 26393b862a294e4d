"""Pack any source of pairs into shards; images are copied byte for byte."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from webdataset import TarWriter

from ..files import atomic_writer, write_bytes
from .images import open_image
from .raw import open_source, read_captions
from .samples import Samples
from .scene_shards import Members
from .shards import SIZES


def pack(
    source: Samples, out: Path, *, shard_size: int = 10_000, progress: Callable[[], None] = lambda: None
) -> dict[str, int]:
    """Write the good samples of `source` as `out/00000.tar`, ..., and sizes.json; return the sizes.

    Every sample is decoded once, to leave out bad ones (`source.skipped`), and its bytes are copied. Members are
    numbered. Their .json holds the source's `key` and, for an image with several captions, `captions`; .txt is the
    first of them. progress: called once per sample. Raises ValueError if `out` has shards already, or for a
    `shard_size` below 1.
    """
    if shard_size < 1:
        raise ValueError(f"shard_size: got {shard_size}, expected at least 1")
    if any(out.glob("*.tar")) or (out / SIZES).exists():
        raise ValueError(f"out: {out} has shards already, expected a folder without any")
    samples = _members(source, progress)
    sizes: dict[str, int] = {}
    for number in itertools.count():
        first = next(samples, None)
        if first is None:
            break
        path = out / f"{number:05d}.tar"
        with atomic_writer(path) as file, TarWriter(file, encoder=False, mtime=0) as tar:
            sizes[path.name] = 0
            for sample in itertools.chain([first], itertools.islice(samples, shard_size - 1)):
                tar.write(sample)
                sizes[path.name] += 1
    write_bytes(out / SIZES, json.dumps(sizes, indent=0).encode())
    return sizes


def _members(source: Samples, progress: Callable[[], None]) -> Iterator[Members]:
    numbers = itertools.count()
    for raw in source.undecoded(0, 0, 1):
        progress()
        if source.decode(raw) is None:
            continue
        captions, _ = read_captions(raw.captions)
        text = " ".join(captions[0].splitlines())  # each line would be a caption
        notes = {"key": raw.key} | ({"captions": captions} if captions != [text] else {})
        image = _read(raw.image)
        sample: Members = {"__key__": f"{next(numbers):09d}", _suffix(image): image}
        sample |= {"txt": text.encode(), "json": json.dumps(notes).encode()}
        yield sample | ({"mask.png": _read(raw.mask)} if source.masks else {})


def _read(data: bytes | Path | str | None) -> bytes:
    with open_source(data) as stream:
        return stream.read()


def _suffix(image: bytes) -> str:
    """Return the suffix of an image by its content, not by the name of its file."""
    with open_image(image, max_pixels=sys.maxsize) as opened:
        return str(opened.format).lower().replace("jpeg", "jpg").replace("mpo", "jpg")
