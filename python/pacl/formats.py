"""How values are shown to people."""

from __future__ import annotations

import math


def printable(text: str) -> str:
    """The text without control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() else " " for c in text)


def one_line(text: object) -> str:
    """The text without line breaks and control characters."""
    return printable(" ".join(str(text).split()))


def percent(share: float) -> float | None:
    """A fraction in percent of two decimals; None for NaN."""
    return None if math.isnan(share) else round(100 * share, 2)
