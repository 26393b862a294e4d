"""Atomic writing of files: a reader never sees half a file, and a crash leaves the old one."""

from __future__ import annotations

import codecs
import contextlib
import errno
import hashlib
import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from .remote import Location, RemotePath, open_binary

try:
    import fcntl
except ImportError:  # Windows, where an open file cannot be deleted, so that no lock is needed
    fcntl = None  # type: ignore[assignment]

SUFFIX = ".part"  # of temporary files: ".model.safetensors.x7k_2b9q.part"


@contextlib.contextmanager
def atomic_writer(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`; on success flush it to disk and rename it to `path`.

    On any exception, a KeyboardInterrupt or a full disk included, `path` keeps its contents and the temporary file is
    removed. What a killed process left of an earlier write to `path` is removed, too. Missing parent folders are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_unfinished(path.parent, path.name)
    descriptor, temporary = _temporary(path)
    try:
        with named_if_full(path), _locked_copy(descriptor):  # remove_unfinished keeps locked files, up to the renaming
            with os.fdopen(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            # mkstemp gives 0600 whatever the umask; the result gets the permissions of the user's umask.
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)
            os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def named_if_full(path: str | os.PathLike) -> Iterator[None]:
    """Name `path` in the OSError of a full disk, which has no name if it comes from writing to an open file."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) and error.filename is None:
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
        raise


def write_bytes(path: str | os.PathLike | RemotePath, data: bytes) -> None:
    """Replace the contents of `path` by `data`, atomically."""
    if isinstance(path, RemotePath):
        return path.write_bytes(data)
    with atomic_writer(path) as file:
        file.write(data)


def remove_unfinished(folder: Location, name: str | None = None) -> None:
    """Delete the temporary files that killed processes left in `folder`: those for `name`, or for all names.

    Files of processes that are still writing are locked, and stay. Where the file system has no locks, all stay. In a
    store there are none.
    """
    if isinstance(folder, RemotePath):
        return
    pattern = re.compile(rf"\.{'.+' if name is None else re.escape(name)}\.[a-z0-9_]{{8}}{re.escape(SUFFIX)}")
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if pattern.fullmatch(entry.name):
                with contextlib.suppress(OSError):
                    _remove_unlocked(entry.path)


def _remove_unlocked(path: str) -> None:
    if fcntl is None:
        os.unlink(path)
        return
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)
    finally:
        os.close(descriptor)


def _temporary(path: Path) -> tuple[int, str]:
    """Create and lock a temporary file for `path`; return its descriptor and its path."""
    while True:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=SUFFIX)
        if fcntl is not None:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.path.exists(temporary):
            return descriptor, temporary
        os.close(descriptor)  # another process found it in the moment before it was locked, and removed it


@contextlib.contextmanager
def _locked_copy(descriptor: int) -> Iterator[None]:
    """Keep the lock of a file beyond its closing, by a second descriptor; not on Windows, where that would keep it."""
    if fcntl is None:
        yield
        return
    copy = os.dup(descriptor)
    try:
        yield
    finally:
        os.close(copy)


def impostor(path: str | os.PathLike | RemotePath, *, binary: bool = True) -> str | None:
    """Return what stands in place of a file's content, "a pointer of Git LFS ...", or None for what may be content.

    Known are pointers of Git LFS, pages of HTML and empty files, and with `binary` any other text. A file that cannot
    be read is none of these.
    """
    try:
        with open_binary(path) as file:
            start = file.read(256)
    except OSError:
        return None
    if not start:
        return "an empty file"
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, in place of the file itself (git lfs pull fetches it)"
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "a page of HTML, in place of the file itself (the download went wrong)"
    if not binary:
        return None
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(start)  # its last letter may be cut
    except UnicodeDecodeError:
        return None
    return "a text" if all(letter.isprintable() or letter.isspace() for letter in text) else None


def file_digest(path: str | os.PathLike | RemotePath) -> str:
    """Return the SHA-256 of a file in hexadecimal. A processor with instructions for it reads 1 to 2 GB a second."""
    digest = hashlib.sha256()
    with open_binary(path) as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def visible_files(folder: str | os.PathLike[str], seen: set[str] | None = None) -> Iterator[str]:
    """Yield the paths of the files in a folder and its subfolders, but not of hidden files nor in hidden folders.

    Links to folders are followed, each folder once. A folder that cannot be read is left out with a warning.
    seen: real paths of folders to leave out; those visited are added.
    """
    seen = set() if seen is None else seen
    for parent, folders, files in os.walk(os.fspath(folder), onerror=_warn_of_folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.path.join(parent, name) for name in files if not name.startswith("."))


def _warn_of_folder(error: OSError) -> None:
    warnings.warn(f"{error.filename}: left out, because it cannot be read ({error.strerror})", stacklevel=2)
