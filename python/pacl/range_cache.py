"""A cache of byte ranges in a local folder, with a size that it never exceeds, shared by processes."""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where processes do not wait for each other, so that the size is approximate
    fcntl = None  # type: ignore[assignment]

CHECK_BYTES = 4  # a CRC-32 behind the data: after a power failure a file may have its size without its content
KEPT = 0.9  # share of the largest size that stays when the oldest ranges are deleted


@dataclass(frozen=True)
class RangeCache:
    """Ranges of bytes by key. Those that were read longest ago make room for new ones.

    folder: local folder, made when it is missing. most: the largest size of all files in bytes. A disk that fails or
    is full is no error: the range is read from its store again.
    """

    folder: Path
    most: int

    def get(self, key: str, size: int) -> bytes | None:
        """Return the range of `size` bytes, None if it is not there or damaged. key: hexadecimal digits."""
        path = self._path(key)
        try:
            data = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        content, check = data[:-CHECK_BYTES], data[-CHECK_BYTES:]
        return content if len(content) == size and _check(content) == check else None

    def put(self, key: str, data: bytes) -> None:
        """Keep a range. A larger one than the whole cache is not kept."""
        path, size = self._path(key), len(data) + CHECK_BYTES
        if size > self.most:
            return
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with self._locked() as lock:
                total = self._total(lock) + size
                if total > self.most:
                    total = self._shrink(int(self.most * KEPT) - size) + size
                # Before the file is there, so that a process that is killed here does not leave a size too small.
                os.pwrite(lock, f"{total:20}".encode(), 0)
                new = path.with_suffix(".new")
                new.write_bytes(data + _check(data))
                os.replace(new, path)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / key[2:]

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        """Hold the lock of the folder; yield the descriptor of its file, which has the size of all ranges."""
        lock = os.open(self.folder / "size", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield lock
        finally:
            os.close(lock)

    def _total(self, lock: int) -> int:
        try:
            return int(os.pread(lock, 20, 0))
        except ValueError:  # a new folder, or a damaged file
            return self._shrink(self.most)

    def _shrink(self, most: int) -> int:
        """Delete the ranges that were read longest ago until the others fit into `most` bytes; return their size."""
        files = []
        for path in self.folder.glob("??/*"):
            with contextlib.suppress(OSError):
                found = path.stat()
                files.append((found.st_mtime_ns, found.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= most:
                break
            with contextlib.suppress(OSError):
                path.unlink()
                total -= size
        return total


def _check(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(CHECK_BYTES, "little")
