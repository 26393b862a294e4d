"""The command line of `pacl demo`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..flags import parse
from ..formats import one_line


@dataclass(frozen=True)
class DemoFlags:
    """Train a small CLIP on generated scenes, freeze it, train PACL's vision embedder on it, and show how both segment
    unseen scenes. The demo needs no download and no GPU, and takes under 5 minutes on two cores.
    """

    out: Path = Path("pacl-demo")
    """Folder of the results."""
    quick: bool = False
    """Run every stage for a few seconds only; the numbers mean nothing."""
    full: bool = False
    """Also measure everything that the paper measures, into report.html and full.json; takes a few minutes more."""
    seed: int = 0
    """Random seed; the same seed gives the same numbers."""
    threads: int | None = None
    """Number of torch's threads. Default: torch's own choice, at most 4."""
    clip_steps: int | None = None
    """Training steps of the CLIP."""
    embedder_steps: int | None = None
    """Training steps of each embedder."""


def main(argv: Sequence[str], prog: str = "pacl demo") -> int:
    """Run `pacl demo` with these arguments and return its exit status; KeyboardInterrupt passes through."""
    try:
        flags = parse(DemoFlags, argv, prog)
        from .run import QUICK, DemoConfig, run  # after --help, which does not need torch

        if flags.out.exists() and not flags.out.is_dir():
            raise ValueError(f"out: {flags.out} is a file, expected a folder")
        names = {item.name for item in dataclasses.fields(DemoConfig)}
        given = {name: x for name, x in vars(flags).items() if name in names and x is not None}
        config = DemoConfig(**(QUICK if flags.quick else {}) | given)
    except ValueError as error:
        print(f"pacl: error: {one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from error  # the status for arguments that the parser refuses
    run(config, flags.out, full=flags.full)
    return 0
