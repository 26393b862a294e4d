"""Images of an open shard of features: read their records and tokens, or begin to, when a store has the shard."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any


def read_records(shard: Any, start: int, end: int) -> list[dict]:
    """Return records `start` to `end` of an open shard."""
    ends = _ends(shard, start, end)
    data = bytes(shard.get_slice("records")[ends[0] : ends[-1]].numpy())
    return [json.loads(data[a - ends[0] : b - ends[0]]) for a, b in zip(ends, ends[1:], strict=False)]


def read_tokens(shard: Any, row: int, *, packed: bool) -> dict[str, Any]:
    """Return tokens [N, width] of image `row`, and with packed tokens also length, which is N."""
    tokens = shard.get_slice("tokens")[_token_rows(shard, row, packed=packed)]
    return {"tokens": tokens, "length": len(tokens)} if packed else {"tokens": tokens[0]}


def fetch_image(shard: Any, row: int, *, packed: bool) -> None:
    """Begin to read tokens and record of image `row` of a shard in a store."""
    shard.get_slice("tokens").fetch(_token_rows(shard, row, packed=packed))
    ends = _ends(shard, row, row + 1)
    shard.get_slice("records").fetch(slice(ends[0], ends[-1]))


def fetch_texts(shard: Any, rows: Sequence[int]) -> None:
    """Begin to read these texts of a shard in a store."""
    for row in rows:
        shard.get_slice("texts").fetch(slice(row, row + 1))


def _ends(shard: Any, start: int, end: int) -> list[int]:
    """Return the byte before which record `start` begins, and those before which records `start` to `end` end."""
    ends = shard.get_slice("ends")[max(0, start - 1) : end].tolist()
    return ends if start else [0, *ends]


def _token_rows(shard: Any, row: int, *, packed: bool) -> slice:
    if not packed:
        return slice(row, row + 1)
    stop = shard.get_slice("token_ends")[max(0, row - 1) : row + 1].tolist()
    start, end = stop if row else (0, stop[0])
    if not 0 <= start < end <= shard.get_slice("tokens").get_shape()[0]:
        raise ValueError(f"token_ends of image {row} are {start} and {end}")
    return slice(start, end)
