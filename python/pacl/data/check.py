"""Count and check a source of pairs."""

from __future__ import annotations

import hashlib
import itertools
import statistics
from functools import cache
from typing import Any

from ..formats import one_line
from .raw import Raw, open_source
from .samples import Samples
from .shards import Shards, count_members, read_sizes

EXAMPLES = 20  # bad samples that a report names
NAMED = 3  # samples that a line on all of a kind names
SMALLEST = 16  # pixels: the side of a patch of most towers


@cache
def tokenizer_of(model: str) -> Any:
    """Return the tokenizer of an open_clip model; raise ValueError for an unknown name."""
    import open_clip

    from ..pretrained import why_not_loaded

    if ":" not in model and model not in open_clip.list_models():
        raise ValueError(f"model: got {model!r}, expected a model of open_clip")
    try:
        return open_clip.get_tokenizer(model)
    except Exception as error:  # open_clip raises anything for an unknown name
        raise ValueError(why_not_loaded(error, f"model: got the tokenizer of {model}")) from error


def count_tokens(caption: str, tokenizer: Any) -> int:
    """Return the number of a caption's tokens; a short caption gives an upper bound."""
    most = len(caption.encode()) + 3  # a token has at least one byte, besides a beginning and an end
    if most <= tokenizer.context_length:
        return most
    ids = tokenizer([caption], context_length=most)[0]
    return int((ids != ids[-1]).nonzero()[-1]) + 1  # the last ids are padding


def check(source: Samples, sample: int = 1000, *, model: str = "ViT-B-16") -> dict[str, Any]:
    """Count the samples of `source`, decode about `sample` of them from all over it (0: all), and return a report.

    model: the open_clip model whose tokenizer measures captions.

    The report is plain Python for JSON: source, pairs (number of samples), shards (None if there are none), decoded,
    bad (reason to count), bad_share, examples (key, reason and error of the first 20 bad samples), width, height and
    caption_length in letters of the good samples (min, median, max), captions (their number), long, small and repeated
    (numbers of captions that the model cuts, of images below 16 pixels, and of images whose bytes came before), and
    problems, a list of lines, empty if there are none.
    """
    examples: list[dict[str, str]] = []
    sizes: list[tuple[int, int]] = []
    lengths: list[int] = []
    source = source.with_options(
        max_bad_share=1.0,
        captions="all",
        transform=lambda image: image.size,
        on_skip=lambda reason, key, error: examples.append({"key": key, "reason": reason, "error": error}),
    )
    pairs, problems = _check_shards(source) if isinstance(source, Shards) else (source.count(), source.remarks())
    tokenizer = tokenizer_of(model)
    context = tokenizer.context_length
    long, small, again, pairs_again = _Kind(), _Kind(), _Kind(), _Kind()
    seen: dict[bytes, tuple[str, set[str]]] = {}
    for raw in source.undecoded(0, 0, 1) if sample == 0 else itertools.islice(source.spread(sample), sample):
        found = source.decode(raw)
        if found is None:
            continue
        sizes.append(found["image"])
        lengths += [len(caption) for caption in found["captions"]]
        for caption in found["captions"]:
            if (tokens := count_tokens(caption, tokenizer)) > context:
                long.add(f"{raw.key}, {tokens} tokens")
        if min(found["image"]) < SMALLEST:
            small.add(f"{raw.key}, {found['image'][0]} x {found['image'][1]}")
        key, captions = seen.setdefault(_digest(raw), (raw.key, set()))
        if captions:
            again.add(f"{raw.key} is {key}")
        for caption in found["captions"]:
            if caption in captions:
                pairs_again.add(f"{raw.key} is {key}")
            captions.add(caption)
    bad = {reason: count for reason, count in source.skipped.items() if count}
    if pairs == 0:
        problems.append("no pairs")
    if bad:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in bad.items())
        problems.append(f"{sum(bad.values()):,} of {source.seen:,} decoded are bad: {reasons}")
    problems += long.line(f"captions longer than the {context} tokens that {model} reads; the rest is cut")
    problems += small.line(f"images with a side below {SMALLEST} pixels")
    problems += again.line("images that are another's again, byte for byte")
    problems += pairs_again.line("pairs that occur again, image and caption")
    return {
        "source": source.name,
        "pairs": pairs,
        "shards": len(source.paths) if isinstance(source, Shards) else None,
        "decoded": source.seen,
        "captions": len(lengths),
        "bad": bad,
        "bad_share": sum(bad.values()) / max(1, source.seen),
        "examples": examples[:EXAMPLES],
        "width": _spread([width for width, _ in sizes]),
        "height": _spread([height for _, height in sizes]),
        "caption_length": _spread(lengths),
        "long": long.count,
        "small": small.count,
        "repeated": again.count,
        "problems": problems,
    }


def describe(report: dict[str, Any]) -> str:
    """Return a report of `check` as lines of text."""
    shards = "" if report["shards"] is None else f" in {report['shards']:,} shard(s)"
    lines = [
        f"pairs: {report['pairs']:,}{shards}",
        f"decoded: {report['decoded']:,}, with {report['captions']:,} captions",
    ]
    for name in ("width", "height", "caption_length"):
        if report[name]:
            low, middle, high = report[name]
            lines.append(f"{name.replace('_', ' ')}: {low} to {high}, median {middle:g}")
    lines += [f"bad: {item['key']}: {item['reason']}: {item['error']}" for item in report["examples"]]
    more = sum(report["bad"].values()) - len(report["examples"])
    lines += [f"bad: and {more:,} more"] if more > 0 else []
    lines += [f"WRONG: {problem}" for problem in report["problems"]] or ["no problems found"]
    return "\n".join(map(one_line, lines))


class _Kind:
    """Count what is wrong in one way, with the first examples."""

    def __init__(self) -> None:
        self.count, self.named = 0, list[str]()

    def add(self, example: str) -> None:
        self.count += 1
        if self.count <= NAMED:
            self.named.append(example)

    def line(self, what: str) -> list[str]:
        """Return the line of a report on all of them; no line if there are none."""
        more = "; ..." if self.count > NAMED else ""
        return [f"{self.count:,} {what}: {'; '.join(self.named)}{more}"] if self.count else []


def _digest(raw: Raw) -> bytes:
    """Return a digest of the bytes of an image that was read before."""
    with open_source(raw.image) as stream:
        return hashlib.sha256(stream.read()).digest()


def _check_shards(source: Shards) -> tuple[int, list[str]]:
    """Count the samples anew; return the count and a line on each shard that is damaged or contradicts sizes.json."""
    problems, total = [], 0
    known = {folder: read_sizes(folder) for folder in {path.parent for path in source.paths}}
    for path in source.paths:
        count, faults, whole = count_members(path)
        total += count
        if faults:
            reasons = ", ".join(f"{reason} {number:,}" for reason, number in sorted(faults.items()))
            problems.append(f"{path} has members that make no sample: {reasons}")
        said = (known[path.parent] or {}).get(path.name)
        if not whole:
            problems.append(f"{path} cannot be read to its end; {count:,} pairs are readable")
        if said is not None and said != count:
            problems.append(f"{path} holds {count:,} pairs, but sizes.json says {said}")
    return total, problems


def _spread(values: list[int]) -> list[float] | None:
    return [min(values), statistics.median(values), max(values)] if values else None
