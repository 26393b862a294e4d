"""Text and numbers as people read them."""

from __future__ import annotations

import math


def printable(text: str) -> str:
    """Return the text without control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() else " " for c in text)


def one_line(text: object) -> str:
    """Return the text without line breaks and control characters."""
    return printable(" ".join(str(text).split()))


def percent(share: float) -> float | None:
    """Return a fraction in percent, rounded to two decimals; None for NaN."""
    return None if math.isnan(share) else round(100 * share, 2)
