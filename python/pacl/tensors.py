"""Rows of safetensors files, on a disk or in a store, that are wanted soon: announced to the system, or read ahead."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .remote import Location, RemotePath

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
HEAD = 2**16  # bytes at the start of a file that are read at once: the header, and small tensors behind it
MOST_HEADER = 10**8  # safetensors' own limit
Item = TypeVar("Item")
Result = TypeVar("Result")


class Part(NamedTuple):
    """A tensor in a file: its type by safetensors' name, its shape, and its first byte."""

    dtype: str
    shape: tuple[int, ...]
    start: int

    def rows(self, first: int, end: int) -> tuple[int, int]:
        """Return the range of bytes of rows `first` to `end` in the file."""
        size = DTYPES[self.dtype].itemsize * math.prod(self.shape[1:])
        return self.start + first * size, self.start + end * size


class RemoteTensors:
    """A safetensors file in a store, with those methods of safe_open that readers use.

    Raises SafetensorError for another file, StoreError if the store fails.
    """

    def __init__(self, path: RemotePath):
        self.path = path
        size = path.stat().st_size
        self._head = path.start_read(0, min(HEAD, size)).result()
        length = int.from_bytes(self._head[:8], "little") if size >= 8 else MOST_HEADER
        if length > min(MOST_HEADER, size - 8):
            raise SafetensorError("the header is larger than the file")
        if 8 + length > len(self._head):
            self._head = path.start_read(0, 8 + length).result()
        self.parts, self._metadata = parse_header(self._head[8 : 8 + length], 8 + length, size)
        # Integers say where other things lie. They come first, and are kept; a long run has many files open.
        ends = [part.rows(0, part.shape[0])[1] for part in self.parts.values() if part.dtype == "I64"]
        kept = max([8 + length, *(end for end in ends if end <= MOST_HEADER)])
        self._head = self._head[:kept] if kept <= len(self._head) else path.start_read(0, kept).result()
        self._coming: dict[tuple[int, int], Future[bytes]] = {}

    def __enter__(self) -> RemoteTensors:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def keys(self) -> list[str]:
        return list(self.parts)

    def metadata(self) -> dict[str, str] | None:
        return self._metadata

    def get_slice(self, name: str) -> _Slice:
        if name not in self.parts:
            raise SafetensorError(f"there is no tensor {name}")
        return _Slice(self, self.parts[name])

    def get_tensor(self, name: str) -> Tensor:
        part = self.parts[name]
        whole = part._replace(shape=(math.prod(part.shape),))
        return _Slice(self, whole)[:].reshape(part.shape)

    def fetch(self, start: int, end: int) -> None:
        """Begin to read bytes that `read` will be asked for."""
        if end > len(self._head) and (start, end) not in self._coming:
            self._coming[start, end] = self.path.start_read(start, end)

    def read(self, start: int, end: int) -> bytes:
        if end <= len(self._head):
            return self._head[start:end]
        coming = self._coming.pop((start, end), None)
        return (coming or self.path.start_read(start, end)).result()

    def forget(self) -> None:
        """Give up what was fetched and not read."""
        while self._coming:
            self._coming.popitem()[1].cancel()


class _Slice:
    """A tensor of a file in a store, of which rows can be read."""

    def __init__(self, file: RemoteTensors, part: Part):
        self._file, self._part = file, part

    def get_shape(self) -> list[int]:
        return list(self._part.shape)

    def get_dtype(self) -> str:
        return self._part.dtype

    def __getitem__(self, rows: slice) -> Tensor:
        shape, (start, end) = self._range(rows)
        if start == end:
            return torch.empty(shape, dtype=DTYPES[self._part.dtype])
        data = bytearray(self._file.read(start, end))
        return torch.frombuffer(data, dtype=DTYPES[self._part.dtype]).reshape(shape)

    def fetch(self, rows: slice) -> None:
        """Begin to read these rows."""
        _, (start, end) = self._range(rows)
        if start < end:
            self._file.fetch(start, end)

    def _range(self, rows: slice) -> tuple[tuple[int, ...], tuple[int, int]]:
        """Return the shape of some rows, and their range of bytes."""
        first, end, _ = rows.indices(self._part.shape[0])
        end = max(first, end)
        return (end - first, *self._part.shape[1:]), self._part.rows(first, end)


# Any: a file in a store has those methods of safe_open that are used.
def open_tensors(path: Location) -> Any:
    """Open a safetensors file on a disk or in a store."""
    return RemoteTensors(path) if isinstance(path, RemotePath) else safe_open(path, "pt")


def parse_header(header: bytes, start: int, size: int) -> tuple[dict[str, Part], dict[str, str] | None]:
    """Return the tensors of a safetensors file of `size` bytes, which begin at byte `start`, and its metadata.

    Raises SafetensorError for a header that does not fit.
    """
    try:
        entries = json.loads(header)
        metadata = entries.pop("__metadata__", None)
        parts = {}
        for name, entry in entries.items():
            part = Part(entry["dtype"], tuple(entry["shape"]), start + entry["data_offsets"][0])
            end = part.start + DTYPES[part.dtype].itemsize * math.prod(part.shape)
            if not start <= part.start <= end == start + entry["data_offsets"][1] <= size:
                raise ValueError(name)
            parts[name] = part
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise SafetensorError("the header does not describe the tensors") from error
    return parts, metadata


@cache
def _layout(path: Path) -> tuple[dict[str, Part], list[int], list[int] | None]:
    """Return the tensors of a local file of features, the ends of its records, and those of its images' tokens.

    The last is None for a file whose images have equally many tokens.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        parts, _ = parse_header(file.read(length), 8 + length, path.stat().st_size)

        def numbers(name: str) -> list[int]:
            first, end = parts[name].rows(0, parts[name].shape[0])
            file.seek(first)
            return torch.frombuffer(bytearray(file.read(end - first)), dtype=torch.int64).tolist()

        return parts, numbers("ends"), numbers("token_ends") if "token_ends" in parts else None


def announce(path: Path, row: int) -> None:
    """Tell the system that an image of a local file of features is wanted soon, so that a slow disk begins to read."""
    if not hasattr(os, "posix_fadvise"):  # macOS and Windows
        return
    # Who reads the row says what is wrong.
    with contextlib.suppress(OSError, SafetensorError, KeyError, IndexError, OverflowError):
        ranges = ranges_of(path, row)
        file = os.open(path, os.O_RDONLY)
        try:
            for first, end in ranges:
                os.posix_fadvise(file, first, end - first, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(file)


def ranges_of(path: Path, row: int) -> list[tuple[int, int]]:
    """Return the first byte and the end of an image's tokens, text and record in a local file of features.

    The text's place is known from the record alone; it is guessed as if all images had equally many captions.
    """
    parts, ends, token_ends = _layout(path)
    text = row * parts["texts"].shape[0] // len(ends)
    tokens = (row, row + 1) if token_ends is None else _between(token_ends, row)
    rows = {"tokens": tokens, "texts": (text, text + 1), "records": _between(ends, row)}
    return [parts[name].rows(*found) for name, found in rows.items()]


def _between(ends: list[int], row: int) -> tuple[int, int]:
    """Return the start and the end of item `row` of items that lie one after the other."""
    return ends[row - 1] if row else 0, ends[row]


def announced(items: Iterable[Item], announce: Callable[[Item], None], ahead: int) -> Iterator[Item]:
    """Yield the items; each is announced `ahead` items before."""
    waiting: deque[Item] = deque()
    for item in items:
        announce(item)
        waiting.append(item)
        if len(waiting) > ahead:
            yield waiting.popleft()
    yield from waiting


def read_ahead(read: Callable[[Item], Result], items: Iterable[Item], ahead: int) -> Iterator[Result]:
    """Yield the result of `read` for each item, in their order; `ahead` threads read those that come next."""
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(ahead)
    try:
        for item in items:
            waiting.append(pool.submit(read, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
