"""The command line of `pacl serve`."""

from __future__ import annotations

from collections.abc import Sequence

import tyro

from ..segment.options import ServeOptions


def main(argv: Sequence[str], prog: str = "pacl serve") -> int:
    """Run `pacl serve` until Ctrl-C, which raises KeyboardInterrupt."""
    options = tyro.cli(ServeOptions, args=list(argv), prog=prog)
    from .run import serve  # imports torch, which takes seconds that --help should not

    return serve(options)
