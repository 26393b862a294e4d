"""Text and numbers as people read them."""

from __future__ import annotations

import math
import re

WORKER = re.compile(r"Caught \w+ in DataLoader worker process \d+\.")
ADDRESS = re.compile(r"<(?:\w+\.)*(\w+) object at 0x[0-9a-fA-F]+>")


def printable(text: str) -> str:
    """Return the text without control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() else " " for c in text)


def one_line(text: object) -> str:
    """Return the text without line breaks, control characters and the addresses of objects (`<X object at 0x...>`).

    Of an error that torch passes on from a worker of a loader, with its traceback, return the error alone.
    """
    lines = str(text).strip().splitlines()
    if lines and WORKER.match(lines[0]):
        text = lines[-1].partition(": ")[2] or lines[-1]
    return printable(ADDRESS.sub(r"a \1", " ".join(str(text).split())))


def percent(share: float) -> float | None:
    """Return a fraction in percent, rounded to two decimals; None for NaN."""
    return None if math.isnan(share) else round(100 * share, 2)
