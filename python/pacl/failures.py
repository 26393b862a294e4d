"""Lines for failures of the machine: memory that ran out, and processes that were lost."""

from __future__ import annotations

import errno
import re

_MEMORY = re.compile(r"can't allocate memory|not enough memory|out of memory|ALLOC_FAILED|Caught MemoryError", re.I)
_SIZE = re.compile(r"tried to allocate ([\d.]+ (?:bytes|[KMGT]iB))", re.I)
_COLLECTIVE = re.compile(r"gloo|nccl|closed by peer|reset by peer|broken pipe|ProcessGroup", re.I)
_LATE = re.compile(r"time[d ]*out", re.I)


def describe(error: BaseException) -> str | None:
    """Return one line for a failure of the machine; None for any other exception, which may be a mistake in a program.

    Known are: memory that ran out here, on a GPU or in a data reader; a data reader that died (see Loader); and a
    collective that failed, because another process ended or did not come.
    """
    if isinstance(error, ChildProcessError):
        return str(error)
    return _memory(error) or collective(error)


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
