"""The command line of `pacl serve`."""

from __future__ import annotations

from collections.abc import Sequence

from ..flags import parse
from ..segment.options import ServeOptions


def main(argv: Sequence[str], prog: str = "pacl serve") -> int:
    """Run `pacl serve` until Ctrl-C, which raises KeyboardInterrupt."""
    options = parse(ServeOptions, argv, prog)
    from .run import serve  # imports torch, which takes seconds that --help should not

    return serve(options)
