"""Write the tables of README.md and of the pages in docs from the files in `benchmarks/results`.

    python benchmarks/fill_tables.py           # write
    python benchmarks/fill_tables.py --check   # exit with 1 if a page differs

A table stands in a page between two comments, for example `<!-- table: h100-bfloat16-dot -->` and `<!-- /table -->`.
The words after the colon name files of results without their dates: of several with the same name the newest counts.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import performance_tables
import result_tables as tables
import scale
import study_tables

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DATED = re.compile(r"(\d{4}-\d\d-\d\d)-(.+)\.json")
THROUGHPUT = re.compile(r".+-(float32|bfloat16|float16)-(dot|cosine|max)(-\d+)?")
MARK = re.compile(r"<!-- (\w+)(?:: ([^>]*))? -->\n(?:(?!<!-- /).*\n)*?<!-- /\1 -->")


class Results:
    """Newest files of a folder, by their names without dates."""

    def __init__(self, folder: Path = RESULTS):
        self.paths: dict[str, Path] = {}
        for path in sorted(folder.glob("*.json")):
            if match := DATED.fullmatch(path.name):
                self.paths[match[2]] = path

    def read(self, name: str) -> dict:
        if name not in self.paths:
            raise ValueError(f"benchmarks/results has no file named {name}, expected DATE-{name}.json")
        return json.loads(self.paths[name].read_text())

    def throughput(self, suffix: str = "") -> dict[str, dict]:
        names = [name.removesuffix(suffix) for name in self.paths if name.endswith(suffix)]
        return {name: self.read(name + suffix) for name in names if THROUGHPUT.fullmatch(name)}


def _summary(results: Results) -> str:
    return tables.summary(results.throughput())


def _before_after(results: Results, before: str, after: str = "") -> str:
    """Return the results whose names end with `before`, beside those that end with `after`."""
    ends = results.throughput(after)
    return tables.before_after({name: (x, ends[name]) for name, x in results.throughput(before).items()})


def _throughput(results: Results, name: str) -> str:
    return tables.throughput(results.read(name), results.paths[name].name)


def _of_one(function: Callable[..., str], default: str | None = None) -> Callable[..., str]:
    """Return a table of one file: the file `default`, or the first word; further words are further arguments."""
    if default is None:
        return lambda results, name, *words: function(results.read(name), *words)
    return lambda results: function(results.read(default))


# Name of the comment -> function of the results and of the comment's words.
TABLES: dict[str, Callable[..., str]] = {
    "step_table": _of_one(tables.one_step, "h100-bfloat16-dot"),
    "demo_table": _of_one(tables.demo, "demo-seed0"),
    "summary": _summary,
    "before_after": _before_after,
    "table": _throughput,
    "plan_errors": _of_one(tables.plan_errors, "plan-errors"),
    "plan_summary": _of_one(tables.plan_summary, "plan-errors"),
    "study": _of_one(study_tables.study),
    "all_pairs": _of_one(study_tables.all_pairs),
    "real_words": _of_one(study_tables.real_words),
    "readings": _of_one(study_tables.readings),
    "cross_attention": _of_one(study_tables.cross_attention),
    "tolerance_study": _of_one(study_tables.tolerance_study),
    "coherence_weights": _of_one(study_tables.coherence_weights),
    "coherence_towers": _of_one(study_tables.coherence_towers),
    "training_step": _of_one(tables.training_step),
    "scale": _of_one(scale.scale, "epyc-zen4-2cores-training-step"),
    "reading": _of_one(tables.reading),
    "segment_folder": _of_one(tables.segment_folder),
    "text_index": _of_one(tables.text_index),
    "long_run": _of_one(tables.long_run),
    "distributed": _of_one(tables.distributed),
    "distributed_model": _of_one(tables.distributed_model),
    "attention_in_memory": _of_one(tables.attention_in_memory),
    "upsample": _of_one(tables.upsample),
    "goals": performance_tables.goals,
    "slowest": performance_tables.slowest,
    "sweep": performance_tables.sweep,
    "end_to_end": performance_tables.end_to_end,
}


def fill(text: str, results: Results) -> str:
    """Return the page with every table made anew. Comments with other names stay."""

    def replace(match: re.Match) -> str:
        if match[1] not in TABLES:
            return match[0]
        table = TABLES[match[1]](results, *(match[2] or "").split())
        opening = match[0].partition("\n")[0]
        return f"{opening}\n{table}\n<!-- /{match[1]} -->"

    return MARK.sub(replace, text)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="Write nothing, and exit with 1 if a page differs.")
    check, results, different = parser.parse_args(argv).check, Results(), []
    for path in pages():
        text = path.read_text(encoding="utf-8")
        try:
            filled = fill(text, results)
        except ValueError as error:
            sys.exit(f"{path.relative_to(ROOT)}: {error}")
        if filled != text:
            different.append(path.relative_to(ROOT).as_posix())
            if not check:
                path.write_text(filled, encoding="utf-8")
    if check and different:
        sys.exit(f"tables differ from benchmarks/results: {', '.join(different)}; run python benchmarks/fill_tables.py")
    print(f"{'checked' if check else 'written'}: {', '.join(different) or 'no page differs'}")


if __name__ == "__main__":
    main()
