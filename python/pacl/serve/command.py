"""The command line of `pacl serve`."""

from __future__ import annotations

from collections.abc import Sequence

import tyro

from ..segment.options import ServeOptions


def main(argv: Sequence[str], prog: str = "pacl serve") -> int:
    """Run `pacl serve` until Ctrl-C, which is a KeyboardInterrupt."""
    options = tyro.cli(ServeOptions, args=list(argv), prog=prog)
    from .run import serve  # torch takes seconds, which --help has not

    return serve(options)
