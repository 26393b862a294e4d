"""Locations of files: local paths, and addresses of objects in remote stores, which behave like paths."""

from __future__ import annotations

import fnmatch
import io
import os
import re
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeAlias

from .formats import printable
from .stores import PACKAGES, Info, Store, check_installed, find, names_in, start_read, write

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")  # of two letters or more; `c:` is a drive
BLOCK = 2**23  # bytes that are read at once
AHEAD = 3  # blocks that are read while the one before them is in use


class RemotePath:
    """The address of an object, or of a folder of objects, with those methods of Path that readers use.

    What the store says about an object is asked for once. From then on every read must come from the same object.
    """

    def __init__(self, url: str, store: Store):
        self.url, self.store = url.rstrip("/"), store
        self.name = self.url.rpartition("/")[2]
        self._info: Info | None = None

    @property
    def suffix(self) -> str:
        return os.path.splitext(self.name)[1]

    @property
    def parent(self) -> RemotePath:
        return RemotePath(self.url.rpartition("/")[0], self.store)

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self.url}/{name}", self.store)

    def __str__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        return f"RemotePath({self.url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and self.url == other.url

    def __lt__(self, other: RemotePath) -> bool:
        return self.url < other.url

    def __hash__(self) -> int:
        return hash(self.url)

    @property
    def info(self) -> Info:
        """The object's size and tag. Raises FileNotFoundError for none, StoreError if the store fails."""
        look_up([self])
        if self._info is None:
            raise FileNotFoundError(2, "No such object", self.url)
        return self._info

    def is_file(self) -> bool:
        look_up([self])
        return self._info is not None

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def iterdir(self) -> list[RemotePath]:
        return self.glob("*")

    def is_dir(self) -> bool:
        """Return True for a folder with objects directly in it. Servers of https:// list no folders."""
        return not self.url.startswith("https:") and bool(names_in(self.url, self.store))

    def stat(self) -> RemoteStat:
        return RemoteStat(self.info.size)

    def glob(self, pattern: str) -> list[RemotePath]:
        """Return the objects directly below this folder whose names match, in the order of their names."""
        if self.url.startswith("https:"):
            return []
        return [self / name for name in names_in(self.url, self.store) if fnmatch.fnmatchcase(name, pattern)]

    def start_read(self, start: int, end: int) -> Future[bytes]:
        """Begin to read bytes `start` to `end`."""
        return start_read(self.url, start, end, self.info, self.store)

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """Open the object for reading; blocks ahead of the reader come in the background."""
        if mode != "rb":
            raise ValueError(f"mode: got {mode!r}, expected 'rb'")
        return io.BufferedReader(_Stream(self), 2**16)

    def read_bytes(self) -> bytes:
        with self.open() as file:
            return file.read()

    def write_bytes(self, data: bytes) -> None:
        """Replace the object as a whole. Raises StoreError."""
        write(self.url, data, self.store)
        self._info = None


class RemoteStat(NamedTuple):
    """Size and time of an object. A store has the time of the upload, which says nothing about the content: 0."""

    st_size: int
    st_mtime_ns: int = 0


Location: TypeAlias = Path | RemotePath


class _Stream(io.RawIOBase):
    """The bytes of an object, in blocks that are read ahead."""

    def __init__(self, path: RemotePath):
        self._path, self._size, self._at = path, path.info.size, 0
        self._blocks: dict[int, Future[bytes]] = {}

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + (0, self._at, self._size)[whence])
        return self._at

    # mypy: the type of the buffer is typeshed's own.
    def readinto(self, buffer: Any) -> int:
        if self._at >= self._size:
            return 0
        number, offset = divmod(self._at, BLOCK)
        wanted = range(number, min(number + 1 + AHEAD, -(-self._size // BLOCK)))
        self._drop(set(self._blocks) - set(wanted))
        for n in wanted:
            if n not in self._blocks:
                self._blocks[n] = self._path.start_read(n * BLOCK, min((n + 1) * BLOCK, self._size))
        part = self._blocks[number].result()[offset : offset + len(buffer)]
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)

    def close(self) -> None:
        self._drop(set(self._blocks))
        super().close()

    def _drop(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self._blocks.pop(number).cancel()


def location(name: str | os.PathLike[str] | RemotePath, store: Store | None = None) -> Location:
    """Return the local path or the remote address that `name` stands for.

    Raises ValueError for another scheme than s3, gs, hf and https, for one whose package is not installed, and for an
    address with a secret in it: a user, a password or a query.
    """
    if isinstance(name, RemotePath):
        return name
    text = os.fspath(name)
    match = SCHEME.match(text)
    if match is None:
        return Path(text)
    scheme = match[1]
    if scheme not in PACKAGES or not text.startswith(f"{scheme}://"):
        kinds = ", ".join(f"{each}://" for each in PACKAGES)
        raise ValueError(f"shards: got {_public(text)!r}, expected a local path or an address of {kinds}")
    if _public(text) != text or printable(text) != text:
        raise ValueError(
            f"shards: got {_public(text)!r} with a user, a password, a query or a control character, expected an "
            "address without, because it is written to logs and files; the store's library has its own credentials"
        )
    check_installed(scheme)
    return RemotePath(text, store or Store())


def writable(folder: str, store: Store | None = None) -> Location:
    """Return the location of a folder to write to; raise ValueError for https://, which is only read."""
    if folder.startswith("https:"):
        raise ValueError(f"out: got {folder}, expected a local folder or one at s3://, gs:// or hf://")
    return location(folder, store)


def is_remote(name: str | os.PathLike[str] | RemotePath) -> bool:
    """Return True for an address in a store."""
    return isinstance(name, RemotePath) or os.fspath(name).startswith(tuple(f"{scheme}://" for scheme in PACKAGES))


def look_up(paths: Iterable[Location]) -> None:
    """Ask for size and tag of remote objects, many at a time; local paths and known objects are passed over."""
    unknown = [path for path in paths if isinstance(path, RemotePath) and path._info is None]
    if unknown:
        for path, info in zip(unknown, find([path.url for path in unknown], unknown[0].store), strict=True):
            path._info = info


def open_binary(path: str | os.PathLike[str] | RemotePath) -> IO[bytes]:
    """Open a local file or a remote object for reading."""
    return path.open() if isinstance(path, RemotePath) else open(path, "rb")


def _public(text: str) -> str:
    """Return an address without what may be a secret."""
    head, slashes, rest = printable(text).partition("://")
    if not slashes:
        return head
    rest = re.sub(r"[?#].*", "?...", rest)
    host, slash, path = rest.partition("/")
    return head + slashes + ("...@" + host.rpartition("@")[2] if "@" in host else host) + slash + path
