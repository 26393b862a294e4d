"""The command line of `pacl demo`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class DemoFlags:
    """Train a small CLIP on generated scenes, freeze it, train PACL's vision embedder on it, and show how both segment
    scenes they have not seen. Needs no download and no GPU; under 5 minutes on two cores."""

    out: Path = Path("pacl-demo")
    """Folder of the results."""
    quick: bool = False
    """Every stage once in seconds, numbers without meaning."""
    full: bool = False
    """All measures of the paper too, a few minutes more: report.html, full.json."""
    seed: int = 0
    """Same seed, same numbers."""
    threads: int | None = None
    """Torch's threads (default: those that torch takes by itself, 4 at most)."""
    clip_steps: int | None = None
    """Training steps of the CLIP."""
    embedder_steps: int | None = None
    """Training steps of each embedder."""


def main(argv: Sequence[str], prog: str = "pacl demo") -> int:
    """Run `pacl demo` with these arguments; returns its exit status, and passes on KeyboardInterrupt."""
    flags = tyro.cli(DemoFlags, args=list(argv), prog=prog)
    from .run import QUICK, DemoConfig, run  # after --help, which needs none of it

    try:
        if flags.out.exists() and not flags.out.is_dir():
            raise ValueError(f"out: {flags.out} is a file, expected a folder")
        names = {item.name for item in dataclasses.fields(DemoConfig)}
        given = {name: x for name, x in vars(flags).items() if name in names and x is not None}
        config = DemoConfig(**(QUICK if flags.quick else {}) | given)
    except ValueError as error:
        print(f"pacl: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error  # as for arguments that the parser refuses
    run(config, flags.out, full=flags.full)
    return 0
