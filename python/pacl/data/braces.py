"""Expand braces in the names of shards, as open_clip does, but only up to a number of names."""

from __future__ import annotations

import re
from itertools import accumulate

import braceexpand

MOST_NAMES = 1_000_000
MOST_CHARACTERS = 4096
MOST_LEVELS = 100  # of nested braces, which braceexpand takes by recursion
RANGE = r"\{(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?\}"


def expand_braces(name: str) -> list[str]:
    """Return the names that `name` stands for: `a-{00..01}.tar` gives a-00.tar and a-01.tar.

    Raises ValueError for braces that do not match or are nested more than 100 deep, for more than 4,096 characters, and
    for more than a million names.
    """
    if len(name) > MOST_CHARACTERS:
        raise ValueError(f"shards: got a name of {len(name):,} characters, expected at most {MOST_CHARACTERS:,}")
    depth = accumulate((x == "{") - (x == "}") for x in name)
    if max(depth, default=0) > MOST_LEVELS:
        raise ValueError(f"shards: got {_short(name)}, expected braces that are not nested so deeply")
    # braceexpand makes lists of ranges and nested braces, so count before it begins.
    if count_names(name) > MOST_NAMES:
        raise ValueError(f"shards: got {_short(name)}, which stands for more than {MOST_NAMES:,} names, expected fewer")
    try:
        return list(braceexpand.braceexpand(name))
    except ValueError as error:
        raise ValueError(f"shards: got {_short(name)}, expected a closing brace for every opening one") from error


def count_names(name: str) -> int:
    """Return the number of names that `name` stands for; one whose braces do not match gives an upper bound."""
    levels = [[0, 1]]  # of each open brace: names of its finished alternatives, and of the current one
    for found in re.finditer(RANGE + r"|\{\w\.\.\w|[{},]", name):
        token, (first, last, step) = found[0], found.groups()
        if first is not None:
            levels[-1][1] *= abs(int(last) - int(first)) // max(1, abs(int(step or 1))) + 1
        elif token == "}" and len(levels) > 1:
            levels[-2][1] *= sum(levels.pop())
        elif token == "," and len(levels) > 1:
            levels[-1] = [sum(levels[-1]), 1]
        elif token == "{":
            levels.append([0, 1])
        elif token.startswith("{"):  # a range of characters, {a..z}
            levels.append([0, 52])
    count = 1
    for level in levels:
        count *= sum(level)
    return count


def _short(name: str) -> str:
    return repr(name if len(name) <= 80 else name[:80] + "...")
