"""The command lines of `pacl look` and `pacl segment`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ..flags import parse
from .options import LookOptions, SegmentOptions

OPTIONS: dict[str, type[LookOptions] | type[SegmentOptions]] = {
    "pacl look": LookOptions,
    "pacl segment": SegmentOptions,
}


def main(argv: Sequence[str], prog: str) -> int:
    """Run the command `prog`, "pacl look" or "pacl segment", and return its exit status: 3 if it left images out."""
    options: LookOptions | SegmentOptions = parse(OPTIONS[prog], argv, prog)
    if not options.images:
        print(f"{prog}: error: images: got none, expected files or folders of images", file=sys.stderr)
        return 2
    from .run import run  # imports torch, which takes seconds that --help should not

    return run(options)
