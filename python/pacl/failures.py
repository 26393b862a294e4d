"""Lines for errors: memory that ran out, processes that were lost, and files that the system cannot open."""

from __future__ import annotations

import errno
import os
import re

from .formats import one_line

_MEMORY = re.compile(r"can't allocate memory|not enough memory|out of memory|ALLOC_FAILED|Caught MemoryError", re.I)
_SIZE = re.compile(r"tried to allocate ([\d.]+ (?:bytes|[KMGT]iB))", re.I)
_COLLECTIVE = re.compile(r"gloo|nccl|closed by peer|reset by peer|broken pipe|ProcessGroup", re.I)
_LATE = re.compile(r"time[d ]*out", re.I)


class StoreError(OSError):
    """A store of remote objects fails, refuses access, or has other objects than at the beginning.

    The message is one sentence that names the address. It is an OSError without a number, so that commands end with it.
    """


def describe(error: BaseException) -> str | None:
    """Return one line for a failure of the machine; None for any other exception, which may be a mistake in a program.

    Known are: memory that ran out here, on a GPU or in a data reader; a data reader that died (see Loader); a store
    that fails; and a collective that failed, because another process ended or did not come.
    """
    if isinstance(error, (ChildProcessError, StoreError)):
        return one_line(error)
    return _memory(error) or collective(error)


def sentence(error: BaseException) -> str:
    """Return one line for any error: that of `describe`, one that names the file of an OSError, or its own message."""
    if (failure := describe(error)) is not None:
        return failure
    if isinstance(error, OSError) and error.errno is not None:
        return one_line(_of_system(error))
    return one_line(error) or type(error).__name__


def _of_system(error: OSError) -> str:
    """Name the file and the cause of an error of the operating system."""
    name = error.filename2 or error.filename
    path = os.fsdecode(name) if isinstance(name, (str, bytes)) else ""
    reasons = {
        errno.ENOENT: "does not exist",
        errno.EISDIR: "is a folder, expected a file",
        errno.ENOTDIR: "is not below a folder: a part of this path is a file",
        errno.EEXIST: "exists and is a file, expected a folder",
        errno.EACCES: "may not be opened by this user",
        errno.EPERM: "may not be opened by this user",
        errno.EROFS: "cannot be written: its disk is read-only",
        errno.ENOSPC: "cannot be written: the disk is full",
        errno.EFBIG: "cannot be written: it exceeds the largest file that is allowed",
        errno.EDQUOT: "cannot be written: the user's share of the disk is full",
    }
    reason = reasons.get(error.errno or 0)
    if reason and path:
        return f"{path} {reason}"
    text = error.strerror or type(error).__name__
    return f"{path}: {text}" if path else text


def collective(error: BaseException) -> str | None:
    """Return one line if a collective failed, None otherwise."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    text = str(error)
    if "DistError" not in kinds and not (isinstance(error, RuntimeError) and _COLLECTIVE.search(text)):
        return None
    if _LATE.search(text):
        return "another process did not answer in time (--dist-timeout)"
    return "another process was lost"


def _memory(error: BaseException) -> str | None:
    text = str(error)
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        where = "a data reader" if "DataLoader worker" in text else "this process"
    elif isinstance(error, RuntimeError) and _MEMORY.search(text):
        where = "the GPU" if type(error).__name__ == "OutOfMemoryError" or "CU" in text else "this process"
    else:
        return None
    size = _SIZE.search(text)
    asked = f", which asked for {size[1]} more" if size else ""
    return f"out of memory in {where}{asked}; a smaller --batch-size or fewer --workers take less"
