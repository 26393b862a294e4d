"""Read tar files without believing their headers: no size is read or allocated before it is checked."""

from __future__ import annotations

import gzip
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any

from ..failures import StoreError
from ..files import impostor
from ..remote import Location, open_binary

MOST_MEMBER_BYTES = 2**28
MOST_HEADER_BYTES = 2**14  # of a long name or an extended header; Python's parser takes quadratic time for it
END = bytes(tarfile.BLOCKSIZE)  # a block of zeros ends a tar file


@dataclass(frozen=True)
class Member:
    """A regular file in a tar file. offset: byte at which its content begins, in the uncompressed archive."""

    name: str
    offset: int
    size: int
    stream: IO[bytes]

    def read(self) -> bytes:
        """Return the content; raise ValueError for one that the archive does not hold as a whole."""
        try:
            self.stream.seek(self.offset)
            data = self.stream.read(self.size)
        except StoreError:
            raise
        except Exception as error:  # zlib raises several types
            raise ValueError(f"the compressed bytes of member {self.name!r} are damaged") from error
        if len(data) != self.size:
            raise ValueError(f"member {self.name!r} has {len(data):,} of the {self.size:,} bytes that it claims")
        return data


def members(path: Location, refuse: Callable[[Exception], Any], *, compressed: bool = True) -> Iterator[Member]:
    """Yield the regular files of a tar file in their order; with `compressed` it may be compressed by gzip.

    `refuse` is called with a sentence for every member that is a link, a device, a sparse file or larger than 256 MiB,
    and once for a file that cannot be read to its end; for one that cannot be opened, with the OSError. Folders are
    passed over. Raises StoreError if a store fails.
    """
    try:
        file: Any = open_binary(path)
    except StoreError:
        raise
    except OSError as error:
        refuse(error)
        return
    with file:
        packed = compressed and file.peek(2)[:2] == b"\x1f\x8b"
        stream: Any = gzip.GzipFile(fileobj=file) if packed else file
        # The size of what a compressed file holds is known only after reading it.
        end = None if packed else path.stat().st_size
        try:
            yield from _walk(stream, end, refuse)
        except _Torn as error:
            kind = impostor(path)
            refuse(ValueError(f"it is {kind}" if kind else str(error)))


def contents(path: Location, refuse: Callable[[Exception], Any]) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of the members that `members` yields; one that is cut is refused too."""
    for member in members(path, refuse):
        try:
            data = member.read()
        except ValueError as error:
            refuse(error)
            return
        yield member.name, data


class _Torn(Exception):
    """Nothing behind this place of an archive can be read."""


class _Headers:
    """The file object that tarfile reads headers from; it refuses to read more than the largest sensible one."""

    def __init__(self, stream: IO[bytes]):
        self.seek, self.tell, self._read = stream.seek, stream.tell, stream.read

    def read(self, count: int) -> bytes:
        if not 0 <= count <= MOST_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {count:,} bytes, expected at most {MOST_HEADER_BYTES:,}")
        return self._read(count)


def _walk(stream: IO[bytes], end: int | None, refuse: Callable[[Exception], Any]) -> Iterator[Member]:
    tar: Any = None
    place = 0
    while True:
        try:
            # Opening reads the first header.
            tar = tarfile.TarFile(fileobj=_Headers(stream)) if tar is None else tar  # type: ignore[arg-type]
            found = tar.next()
        except StoreError:
            raise
        except Exception as error:  # RecursionError, ValueError, zlib.error, ... besides tarfile's own
            raise _Torn(f"there is no readable tar header at byte {place:,}") from error
        if found is None:
            return _check_end(stream, tar.offset)
        if tar.offset <= place:
            raise _Torn(f"the tar header at byte {place:,} has a negative size")
        place, tar.members = tar.offset, []  # a list of all members would grow without bound
        # tarfile's size of a sparse file is that of its holes and data.
        reason = None
        if found.issparse():
            reason = "is a sparse file"
        elif not found.isreg() and not found.isdir():
            reason = "is a link or a device"
        elif found.isreg() and end is not None and found.offset_data + found.size > end:
            raise _Torn(f"member {found.name!r} claims {found.size:,} bytes, more than the file holds")
        elif found.size > MOST_MEMBER_BYTES:
            reason = f"claims {found.size:,} bytes"
        if reason:
            most = f"expected a regular file of at most {MOST_MEMBER_BYTES:,} bytes"
            refuse(ValueError(f"member {found.name!r} {reason}, {most}"))
        elif found.isreg():
            yield Member(found.name, found.offset_data, found.size, stream)


def _check_end(stream: IO[bytes], offset: int) -> None:
    """Raise _Torn unless a block of zeros follows: tarfile ends at any damaged header without a word."""
    try:
        stream.seek(offset)
        block = stream.read(tarfile.BLOCKSIZE)
    except StoreError:
        raise
    except Exception as error:
        raise _Torn(f"the compressed bytes behind byte {offset:,} are damaged") from error
    if not block:
        raise _Torn(f"it ends at byte {offset:,} without the zeros that end a tar file; it may have been cut")
    if block != END[: len(block)]:
        raise _Torn(f"there is no readable tar header at byte {offset:,}")
