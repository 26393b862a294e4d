"""Rows of csv and tsv files, whose quotes and separators are often wrong: no row is lost or cut without a word.

- A field that starts with a quote, ends with one, and doubles those within is a quoted field, which may contain
  separators and line breaks, as pandas and Python's csv module write it.
- Any other quote is an ordinary character.
- A quoted field ends on its own line if the lines below are rows themselves, so an unbalanced quote swallows none.
- If the caption is the last column of a row without quoted fields, it is the rest of the line, separators included.
- Any other row with more or fewer fields than the header is bad.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from ..formats import printable
from .images import IMAGE_SUFFIXES, UNREAD_SUFFIXES

SEPARATORS = (",", "\t", ";", "|", " ")  # that a header may have in place of the ones that were tried
MOST_LINES = 100  # of a quoted field; a quote that is not closed after so many is an ordinary character
SUFFIXES = tuple(f".{suffix}" for suffix in (*IMAGE_SUFFIXES, *UNREAD_SUFFIXES))


class Row(NamedTuple):
    """A row of a table. line: its first line, from 1. values: its fields of the wanted columns, None if it is bad.

    fields: their number. joined: True if the caption contains separators that were not quoted.
    """

    line: int
    values: tuple[str, str] | None
    fields: int
    joined: bool = False


class _Open(NamedTuple):
    """A quoted field that does not end with the text. column: its number, from 0. start: index of its first letter."""

    column: int
    start: int


def read_rows(lines: Iterable[str], separator: str, header: Sequence[str], image: int, caption: int) -> Iterator[Row]:
    """Yield the rows below a header; blank lines are left out.

    lines: those below the header, which is line 1. image, caption: indices of the wanted columns.
    """
    waiting: list[str] = []  # lines that were read ahead
    source = iter(lines)
    number = 1
    while (line := waiting.pop(0) if waiting else next(source, None)) is not None:
        number += 1
        line = line.rstrip("\r\n")
        if not line:
            continue
        fields, joined, further = None, False, 0
        if '"' in line:
            fields, further = _quoted(line, waiting, source, separator, (len(header), image))
        quoted = fields is not None
        if fields is None:
            fields = line.split(separator)
            if len(fields) > len(header) and caption == len(header) - 1:
                fields, joined = line.split(separator, caption), True
        whole = len(fields) == len(header)
        if quoted and not whole and further:  # the lines below may be good
            fields, whole, further = line.split(separator), False, 0
        yield Row(number, (fields[image], fields[caption]) if whole else None, len(fields), joined and whole)
        del waiting[:further]
        number += further


def wrong_header(header: str, names: Sequence[str], separator: str | None) -> str:
    """Return a clause on the header of a table that lacks the columns `names`: what it has, and perhaps how to read it.

    separator: the one that was given; None if tab and comma were tried.
    """
    tried = ["\t", ","] if separator is None else [separator]
    columns = max((split_row(header, choice) for choice in tried), key=len)
    shown = printable(", ".join(name for name in columns if name.strip())).strip()[:200]
    if not shown:
        return "its first line names no column"
    flag = {choice: "'\\t'" if choice == "\t" else f"'{choice}'" for choice in SEPARATORS}
    for choice in SEPARATORS:
        if choice not in tried and set(names) <= set(split_row(header, choice)):
            return f"its first line is {shown}; give --csv-separator {flag[choice]}"
    others = [choice for choice in SEPARATORS if choice not in tried and choice in header]
    if len(columns) == 1 and others:
        return f"its first line is {shown}, with {flag[others[0]]} between columns? (--csv-separator)"
    return f"it has the columns {shown}" if len(columns) > 1 else f"it has the column {shown} alone"


def split_row(line: str, separator: str) -> list[str]:
    """Return the fields of a single line, such as a header."""
    fields = _split(line, separator)
    return fields if isinstance(fields, list) else line.split(separator)


def _quoted(
    line: str, waiting: list[str], source: Iterator[str], separator: str, shape: tuple[int, int]
) -> tuple[list[str] | None, int]:
    """Return the fields of a row with quoted fields, and the number of further lines that it takes.

    The fields are None if no field is quoted, or the quotes are wrong. waiting: lines that follow; more are added from
    `source`. shape: the number of columns, and the index of the image's.
    """
    text, further = line, 0
    while True:
        fields = _split(text, separator)
        if fields is None or isinstance(fields, list):
            return fields, further if fields else 0
        rest = line[fields.start :] if not further else text.rpartition("\n")[2]
        if further == MOST_LINES or _is_row(rest, separator, shape, 0 if further else fields.column):
            return None, 0
        if further == len(waiting):
            below = next(source, None)
            if below is None:
                return None, 0
            waiting.append(below)
        below = waiting[further].rstrip("\r\n")
        # The part of the line before its first quote is in the field.
        if _is_row(below.partition('"')[0], separator, shape, 0):
            return None, 0
        text, further = f"{text}\n{below}", further + 1


def _split(text: str, separator: str) -> list[str] | _Open | None:
    """Split a text by the rules of quoted fields; return None if none is quoted, or a quote is followed by letters."""
    fields: list[str] = []
    at, quoted = 0, False
    while True:
        if text.startswith('"', at):
            quoted, end = True, at + 1
            while (end := text.find('"', end)) >= 0 and text.startswith('""', end):
                end += 2
            if end < 0:
                return _Open(len(fields), at + 1)
            field = text[at + 1 : end].replace('""', '"')
            end += 1
            if end < len(text) and text[end] != separator:
                return None
        else:
            end = text.find(separator, at)
            end = len(text) if end < 0 else end
            field = text[at:end]
        fields.append(field)
        if end == len(text):
            return fields if quoted else None
        at = end + 1


def _is_row(text: str, separator: str, shape: tuple[int, int], column: int) -> bool:
    """Return True if a text that begins in a column goes on to the row's end, with an image's path in its place."""
    columns, image = shape
    fields = text.split(separator)
    place = image - column
    return (
        len(fields) >= columns - column
        and 0 <= place < len(fields)
        and fields[place].strip().strip('"').lower().endswith(SUFFIXES)
        and (column == 0 or place > 0)
    )
