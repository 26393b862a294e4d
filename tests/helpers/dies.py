"""Run `pacl` in a process that kills itself, and its children, just before it gives a finished file its name."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from pacl.cli import main


def dies_at(renaming: int, argv: Sequence[str | Path], name: str = "") -> int:
    """Run `pacl` with `argv` until kill -9 just before its `renaming`-th renaming of a file (to `name`, if given).

    Returns the exit status: -9, or that of the command if it renames fewer files. The process is forked from this one,
    which has done the imports.
    """
    sys.stdout.flush()
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    status = 70
    try:
        os.setsid()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        torch.set_num_threads(1)
        replace, seen = os.replace, 0

        def dies(source: str | Path, target: str | Path) -> None:
            nonlocal seen
            seen += name in ("", os.path.basename(target))
            if seen == renaming:
                os.killpg(0, signal.SIGKILL)
            replace(source, target)

        os.replace = dies
        status = main([str(word) for word in argv])
    finally:
        os._exit(status)
