"""`pacl` in processes that are killed: forked from the test's, which has done the imports."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

import ranks
from forks import fork, status
from pacl.cli import main


def fork_pacl(argv: Sequence[str | Path], output: Path | None = None) -> int:
    """Run `pacl` with `argv` in a forked process; return its number."""
    return fork(lambda: main([str(word) for word in argv]), output)


def fork_ranks(
    argv: Sequence[str | Path], count: int, output: Path, dying: Mapping[int, int] | None = None
) -> list[int]:
    """Run `pacl` with `argv` in `count` processes as torchrun does; return their numbers by rank.

    dying: for ranks that die by kill -9, the renaming of a file before which they do (see dies_at).
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["-m", "pacl", *map(str, argv)]

    def be(rank: int) -> int:
        if dying and rank in dying:
            _die_at(dying[rank])
        ranks.be(rank, count, port, command)  # ends by SystemExit
        return 0

    return [fork(lambda rank=rank: be(rank), output) for rank in range(count)]


def children(process: int) -> list[int]:
    return [int(x) for x in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def dies_at(renaming: int, argv: Sequence[str | Path], name: str = "") -> int:
    """Run `pacl` with `argv` until kill -9 just before its `renaming`-th renaming of a file (to `name`, if given).

    Returns the exit status: -9, or that of the command if it renames fewer files.
    """

    def run() -> int:
        _die_at(renaming, name)
        return main([str(word) for word in argv])

    return status(fork(run))


def _die_at(renaming: int, name: str = "") -> None:
    """Let this process and its children die before its `renaming`-th renaming of a file."""
    replace, seen = os.replace, 0

    def dies(source: str | Path, target: str | Path) -> None:
        nonlocal seen
        seen += name in ("", os.path.basename(target))
        if seen == renaming:
            os.killpg(0, signal.SIGKILL)
        replace(source, target)

    os.replace = dies
