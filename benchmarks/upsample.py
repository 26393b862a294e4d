"""Measure time and memory of `upsample_argmax` and of its alternatives, on this CPU, in one interleaved run.

    python benchmarks/upsample.py                       # 21 classes at 448 x 448, 150 at 512 x 683; a minute
    python benchmarks/upsample.py --case 847x96x128x1536x2048 --repeats 3 --json result.json

Scores are noise, which leaves more candidates for the best class than smooth scores. With one thread the time is
processor time, which other programs on the machine hardly change; with more threads it is wall-clock time. Memory is
the process's peak growth, labels included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import report
import torch
from throughput import peak_growth
from torch.nn import functional as F

from pacl_kernels import upsample_argmax
from pacl_kernels.native import native

CASES = ("21x28x28x448x448", "150x32x43x512x683")
CHUNK = 16  # classes
SECONDS = 5.0  # timed runs of a row: a slow one runs less often than --repeats, but at least once
LOGIT_SCALE = 50.0


def eager(scores, size):
    return F.interpolate(scores, size, mode="bilinear").argmax(1)


def eager_entropy(scores, size):
    x = F.interpolate(scores, size, mode="bilinear")
    best, labels = x.max(1)
    return labels, best, torch.special.entr((LOGIT_SCALE * x).softmax(1)).sum(1)


def chunked(scores, size):
    """Compare a few classes at a time with the best so far."""
    best = labels = None
    for first in range(0, scores.shape[1], CHUNK):
        value, label = F.interpolate(scores[:, first : first + CHUNK], size, mode="bilinear").max(1)
        if first == 0:
            best, labels = value, label
        else:
            better = value > best
            best, labels = torch.where(better, value, best), torch.where(better, label + first, labels)
    return labels


def functions(compiled: bool) -> dict:
    def fused(backend, **options):
        return lambda scores, size: upsample_argmax(scores, size, backend=backend, **options)

    entropy = dict(return_best=True, return_entropy=True, logit_scale=LOGIT_SCALE)
    found = {"fused cpu": fused("cpu")} if native() is not None else {}
    found |= {"fused torch": fused("torch"), "eager": eager, "eager, 16 classes at a time": chunked}
    if compiled:
        found["compiled"] = torch.compile(eager, fullgraph=True, dynamic=False)
    if native() is not None:
        found["fused cpu, entropy"] = fused("cpu", **entropy)
    return found | {"eager, entropy": eager_entropy}


def measure(case: str, args) -> dict:
    classes, h, w, *size = map(int, case.split("x"))
    scores = torch.randn(1, classes, h, w, generator=torch.Generator().manual_seed(args.seed))
    clock = time.process_time if args.threads == 1 else time.perf_counter
    rows, truth = {}, None
    whole = 4 * classes * size[0] * size[1]  # bytes of the enlarged scores
    for name, function in functions(args.compile).items():
        if (
            name.startswith("eager")
            and "at a time" not in name
            and whole * (4 if "entropy" in name else 1) > args.limit
        ):
            rows[name] = {"reason": f"needs more than {args.limit / 2**30:.0f} GiB"}
            continue
        begin = clock()
        labels = function(scores, size)  # warm-up
        labels = labels[0] if isinstance(labels, tuple) else labels
        truth = labels if truth is None else truth
        growth = []
        if clock() - begin < args.slow:
            growth.append(peak_growth(lambda function=function: function(scores, size)) / 2**20)
        rows[name] = {
            "function": function,
            "samples": [],
            "peak_mib": growth[0] if growth else None,
            "equal_labels": (labels == truth).double().mean().item(),
        }
    runs = [row for row in rows.values() if "function" in row]
    for turn in range(args.repeats):
        for row in runs[turn % len(runs) :] + runs[: turn % len(runs)]:
            if row["samples"] and sum(row["samples"]) > SECONDS:
                continue
            begin = clock()
            row["function"](scores, size)
            row["samples"].append(clock() - begin)
    fastest = next(iter(rows.values()))
    for row in runs:
        row["ms"] = 1e3 * statistics.median(row["samples"])
        row["runs"] = len(row.pop("samples"))
        del row["function"]
        row["times_ours"] = row["ms"] / fastest["ms"]
    return {"case": case, "rows": [{"name": name, **row} for name, row in rows.items()]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", action="append", help="Case KxhxwxHxW, such as 21x28x28x448x448; repeatable.")
    parser.add_argument("--repeats", type=int, default=9, help="Timed runs of each row.")
    parser.add_argument("--threads", type=int, default=1, help="Threads of torch and of the kernel.")
    parser.add_argument("--limit", type=float, default=8 * 2**30, help="Skip rows that need more bytes than this.")
    parser.add_argument(
        "--slow", type=float, default=60.0, help="Do not measure the memory of rows slower than this, in seconds."
    )
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="Skip torch.compile.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the scores.")
    parser.add_argument("--json", metavar="FILE", help="Write the result.")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = {"machine": report.machine(torch.device("cpu"), native()), "settings": vars(args), "cases": []}
    for case in args.case or CASES:
        result["cases"].append(measure(case, args))
        print(case)
        for row in result["cases"][-1]["rows"]:
            if "reason" in row:
                print(f"  {row['name']:<28} {row['reason']}")
                continue
            memory = "-" if row["peak_mib"] is None else f"{row['peak_mib']:.1f}"
            print(
                f"  {row['name']:<28} {row['ms']:>10.2f} ms  {row['times_ours']:>7.1f} x  {memory:>8} MiB  "
                f"{100 * row['equal_labels']:.4f} % equal labels"
            )
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
