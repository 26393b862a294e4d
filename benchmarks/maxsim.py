"""Time MaxSim of pages and queries on a CPU, and packed patches against padded ones, in interleaved runs.

    python benchmarks/maxsim.py --json result.json
    python benchmarks/maxsim.py --pages 1000 --page-tokens 512 --queries 1  # the shape in the README of maxsim-cpu

The rows are `compatibility(form="max", text_pool="sum")`, plain PyTorch, and maxsim-cpu if it is installed; maxsim-cpu
has no backward and takes rows that are normalised, which is not part of its time. Then `compatibility` on pages with
lengths uniform in [1, --page-tokens], packed and padded with a mask.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import report
import torch
from torch.nn import functional as F

from pacl_kernels import compatibility
from pacl_kernels.native import native

MAXSIM = {"form": "max", "text_pool": "sum"}


def plain(pages: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    s = torch.einsum("pnd,qld->pqln", F.normalize(pages, dim=-1), F.normalize(queries, dim=-1))
    return s.amax(-1).sum(-1)


def with_backward(score: Callable, *leaves: torch.Tensor, **options) -> Callable:
    """Return a function that computes the scores and the gradients of their sum."""
    leaves = tuple(x.detach().requires_grad_() for x in leaves)
    return lambda: torch.autograd.grad(score(*leaves, **options).sum(), leaves)


def runs_of(args) -> dict[str, Callable]:
    """Return what is timed, by its name. Those named "forward" return scores `[pages, queries]`."""
    generator = torch.Generator().manual_seed(args.seed)
    pages = torch.randn(args.pages, args.page_tokens, args.dim, generator=generator)
    queries = torch.randn(args.queries, args.query_tokens, args.dim, generator=generator)
    lengths = torch.randint(1, args.page_tokens + 1, (args.pages,), generator=generator)
    mask = torch.arange(args.page_tokens) < lengths[:, None]
    packed = pages[mask]
    runs: dict[str, Callable] = {
        "fused forward": lambda: compatibility(pages, queries, **MAXSIM),
        "plain forward": lambda: plain(pages, queries),
        "fused step": with_backward(compatibility, pages, queries, **MAXSIM),
        "plain step": with_backward(plain, pages, queries),
        "padded forward": lambda: compatibility(pages, queries, patch_mask=mask, **MAXSIM),
        "packed forward": lambda: compatibility(packed, queries, patch_lengths=lengths, **MAXSIM),
        "padded step": with_backward(compatibility, pages, queries, patch_mask=mask, **MAXSIM),
        "packed step": with_backward(compatibility, packed, queries, patch_lengths=lengths, **MAXSIM),
    }
    try:
        import maxsim_cpu
    except ImportError:
        return runs
    documents, rows = (F.normalize(x, dim=-1).numpy() for x in (pages, queries))
    several = [F.normalize(x[:n], dim=-1).numpy() for x, n in zip(pages, lengths.tolist(), strict=True)]

    def scores(function: Callable, of: object) -> torch.Tensor:
        return torch.stack([torch.as_tensor(function(query, of)) for query in rows], 1)

    runs["maxsim-cpu forward"] = lambda: scores(maxsim_cpu.maxsim_scores, documents)
    runs["maxsim-cpu packed forward"] = lambda: scores(maxsim_cpu.maxsim_scores_variable, several)
    return runs


def check(runs: dict[str, Callable]) -> None:
    """Run everything once, and assert that the forwards agree."""
    results = {name: run() for name, run in runs.items()}
    for name in results.keys() & {"plain forward", "maxsim-cpu forward"}:
        torch.testing.assert_close(results[name], results["fused forward"], rtol=1e-4, atol=1e-4)
    for name in results.keys() & {"padded forward", "maxsim-cpu packed forward"}:
        torch.testing.assert_close(results[name], results["packed forward"], rtol=1e-4, atol=1e-4)


def measure(args) -> dict:
    runs = runs_of(args)
    check(runs)
    samples: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for turn in range(args.repeats):
        shift = turn % len(order)
        for name in order[shift:] + order[:shift]:
            start = time.perf_counter()
            runs[name]()
            samples[name].append(1e3 * (time.perf_counter() - start))
    rows = [{"name": name, "ms": statistics.median(x), "range_ms": [min(x), max(x)]} for name, x in samples.items()]
    return {"machine": report.machine(torch.device("cpu"), native()), "settings": vars(args), "rows": rows}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pages", type=int, default=256, help="Number of pages.")
    add("--page-tokens", type=int, default=256, help="Tokens of each page, the longest if they differ.")
    add("--queries", type=int, default=32, help="Number of queries.")
    add("--query-tokens", type=int, default=32, help="Tokens of each query.")
    add("--dim", type=int, default=128, help="Dimension of the embeddings.")
    add("--threads", type=int, default=torch.get_num_threads(), help="Threads on the CPU.")
    add("--repeats", type=int, default=9, help="Timed runs of each row.")
    add("--seed", type=int, default=0, help="Seed of the inputs.")
    add("--json", metavar="FILE", help="Write the result, with a description of the machine.")
    args = parser.parse_args(argv)
    for name in ("pages", "page_tokens", "queries", "query_tokens", "dim", "threads", "repeats"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: got {getattr(args, name)}, expected at least 1")
    torch.set_num_threads(args.threads)
    os.environ["RAYON_NUM_THREADS"] = str(args.threads)  # of maxsim-cpu, which is not loaded yet
    result = measure(args)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    for row in result["rows"]:
        print(f"{row['name']:26} {row['ms']:9.2f} ms  ({row['range_ms'][0]:.2f} to {row['range_ms'][1]:.2f})")


if __name__ == "__main__":
    main()
