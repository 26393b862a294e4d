"""`pacl` in processes that are killed: forked from the test's, which has done the imports."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import ranks
import torch
from pacl.cli import main


def fork(run: Callable[[], int], output: Path | None = None) -> int:
    """Run `run` in a forked process in a process group of its own, with `output` as its standard output and error.

    Returns the process's number; its exit status is what `run` returns.
    """
    sys.stdout.flush()
    process = os.fork()
    if process:
        with contextlib.suppress(OSError):  # the child has done it
            os.setpgid(process, process)  # here too, so that the group exists when this function returns
        return process
    status = 70
    try:
        os.setpgid(0, 0)
        out = os.open(output or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # pytest has its own
        torch.set_num_threads(1)
        status = run()
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def fork_pacl(argv: Sequence[str | Path], output: Path | None = None) -> int:
    """Run `pacl` with `argv` in a forked process; return its number."""
    return fork(lambda: main([str(word) for word in argv]), output)


def fork_ranks(argv: Sequence[str | Path], count: int, output: Path) -> list[int]:
    """Run `pacl` with `argv` in `count` processes as torchrun does; return their numbers by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["-m", "pacl", *map(str, argv)]

    def be(rank: int) -> int:
        ranks.be(rank, count, port, command)  # ends by SystemExit
        return 0

    return [fork(lambda rank=rank: be(rank), output) for rank in range(count)]


def status(process: int, seconds: float = 300) -> int:
    """Wait for a forked process and return its exit status, -9 after kill -9; kill it after `seconds`."""
    end = time.monotonic() + seconds
    while True:
        ended, code = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(code)
        if time.monotonic() > end:
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
            raise TimeoutError(f"the process did not end in {seconds} s")
        time.sleep(0.01)


def children(process: int) -> list[int]:
    return [int(x) for x in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def dies_at(renaming: int, argv: Sequence[str | Path], name: str = "") -> int:
    """Run `pacl` with `argv` until kill -9 just before its `renaming`-th renaming of a file (to `name`, if given).

    Returns the exit status: -9, or that of the command if it renames fewer files.
    """
    replace, seen = os.replace, 0

    def dies(source: str | Path, target: str | Path) -> None:
        nonlocal seen
        seen += name in ("", os.path.basename(target))
        if seen == renaming:
            os.killpg(0, signal.SIGKILL)
        replace(source, target)

    def run() -> int:
        os.replace = dies
        return main([str(word) for word in argv])

    return status(fork(run))
