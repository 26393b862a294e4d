"""Count and check a source of pairs."""

from __future__ import annotations

import itertools
import statistics
from typing import Any

from ..formats import one_line
from .samples import Samples
from .shards import Shards, count_members, read_sizes

EXAMPLES = 20  # bad samples that a report names


def check(source: Samples, sample: int = 1000) -> dict[str, Any]:
    """Count the pairs of `source`, decode about `sample` of them from all over it (0: all), and return a report.

    The report is plain Python for JSON: source, pairs, shards (None if there are none), decoded, bad (reason to count),
    bad_share, examples (key, reason and error of the first 20 bad samples), width, height and caption_length of the
    good samples (min, median, max), and problems, a list of lines, empty if there are none.
    """
    examples: list[dict[str, str]] = []
    sizes: list[tuple[int, int]] = []
    lengths: list[int] = []
    problems: list[str] = []
    source = source.with_options(
        max_bad_share=1.0,
        transform=lambda image: image.size,
        on_skip=lambda reason, key, error: examples.append({"key": key, "reason": reason, "error": error}),
    )
    if isinstance(source, Shards):
        pairs, problems = _check_shards(source)
    else:
        pairs = source.count()
    for raw in source.undecoded(0, 0, 1) if sample == 0 else itertools.islice(source.spread(sample), sample):
        found = source.decode(raw)
        if found is not None:
            sizes.append(found["image"])
            lengths.append(len(found["caption"]))
    bad = {reason: count for reason, count in source.skipped.items() if count}
    if pairs == 0:
        problems.append("no pairs")
    if bad:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in bad.items())
        problems.append(f"{sum(bad.values()):,} of {source.seen:,} decoded are bad: {reasons}")
    return {
        "source": source.name,
        "pairs": pairs,
        "shards": len(source.paths) if isinstance(source, Shards) else None,
        "decoded": source.seen,
        "bad": bad,
        "bad_share": sum(bad.values()) / max(1, source.seen),
        "examples": examples[:EXAMPLES],
        "width": _spread([width for width, _ in sizes]),
        "height": _spread([height for _, height in sizes]),
        "caption_length": _spread(lengths),
        "problems": problems,
    }


def describe(report: dict[str, Any]) -> str:
    """Return a report of `check` as lines of text."""
    shards = "" if report["shards"] is None else f" in {report['shards']:,} shard(s)"
    lines = [f"pairs: {report['pairs']:,}{shards}", f"decoded: {report['decoded']:,}"]
    for name in ("width", "height", "caption_length"):
        if report[name]:
            low, middle, high = report[name]
            lines.append(f"{name.replace('_', ' ')}: {low} to {high}, median {middle:g}")
    lines += [f"bad: {item['key']}: {item['reason']}: {item['error']}" for item in report["examples"]]
    more = sum(report["bad"].values()) - len(report["examples"])
    lines += [f"bad: and {more:,} more"] if more > 0 else []
    lines += [f"WRONG: {problem}" for problem in report["problems"]] or ["no problems found"]
    return "\n".join(map(one_line, lines))


def _check_shards(source: Shards) -> tuple[int, list[str]]:
    """Count the pairs anew; return the count and the problems: damaged shards, and those that contradict sizes.json."""
    problems, total = [], 0
    known = {folder: read_sizes(folder) for folder in {path.parent for path in source.paths}}
    for path in source.paths:
        count, whole = count_members(path)
        total += count
        said = (known[path.parent] or {}).get(path.name)
        if not whole:
            problems.append(f"{path} cannot be read to its end; {count:,} pairs are readable")
        if said is not None and said != count:
            problems.append(f"{path} holds {count:,} pairs, but sizes.json says {said}")
    return total, problems


def _spread(values: list[int]) -> list[float] | None:
    return [min(values), statistics.median(values), max(values)] if values else None
