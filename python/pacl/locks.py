"""A lock on a folder, so that two commands do not write to it at the same time."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path

from .remote import RemotePath

try:
    import fcntl
except ImportError:  # Windows, where folders are not locked
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
_held: set[int] = set()  # descriptors of the locks of this process


@contextlib.contextmanager
def lock_folder(folder: str | os.PathLike | RemotePath, argument: str = "out") -> Iterator[None]:
    """Hold the lock of `folder`, a file `.lock` in it; the kernel releases it when the process dies, however that is.

    A missing folder is made, and removed again at the end if it is still empty. On Windows nothing is locked. Where
    the file system has no locks (some network file systems), a warning says so. A store has no locks: nothing is done.

    argument: the argument that named the folder, for the error. Raises ValueError if another process has the lock.
    """
    if fcntl is None or isinstance(folder, RemotePath):
        yield
        return
    folder = Path(folder)
    missing = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = _take(folder, argument)
    _held.add(descriptor)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(folder / LOCK)  # before the lock is released; see _take
        _held.discard(descriptor)
        os.close(descriptor)
        if missing:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _take(folder: Path, argument: str) -> int:
    """Open and lock the lock file of `folder`; return its descriptor."""
    path = folder / LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 1000, 0).decode(errors="replace").strip()
            os.close(descriptor)
            raise ValueError(
                f"{argument}: {folder} is in use by {holder or 'another process'} (lock file {path}), expected a "
                "folder that no other command writes to; wait for its end, or choose another folder"
            ) from error
        except OSError as error:
            warnings.warn(
                f"{argument}: {folder} cannot be locked ({error.strerror}); make sure that only one command "
                "writes to it",
                stacklevel=4,
            )
        if _is_at(descriptor, path):
            break
        os.close(descriptor)  # its holder removed the file before this process got the lock; another may have a new one
    _close_after_fork()
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return descriptor


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


@functools.cache
def _close_after_fork() -> None:
    """Close the locks in processes forked from now on: data readers that outlive this process must not hold them."""

    def close() -> None:
        for descriptor in _held:
            os.close(descriptor)
        _held.clear()

    os.register_at_fork(after_in_child=close)
