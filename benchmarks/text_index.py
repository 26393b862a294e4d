"""Time of a step with lists of texts beside the step over all pairs, on a CPU, and what it spends beside its products.

A step is φ forward and backward, with a given ∂L/∂φ. Both steps take turns, and of the repeats the shortest counts.
The step with one text in each list has what does not depend on their length: reading, packing and normalising the
patches, and writing their gradient.

    python benchmarks/text_index.py --json benchmarks/results/DATE-MACHINE-text-index.json
    python benchmarks/text_index.py --clock process --threads 1      # on a machine with other work
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import report
import torch
from torch import Tensor

from pacl_kernels import compatibility
from pacl_kernels.lists import column_sums
from pacl_kernels.native import native
from pacl_kernels.tolerance import lists_of

CLOCKS = {"wall": time.perf_counter, "process": time.process_time}


def step(patches: Tensor, texts: Tensor, grad: Tensor, form: str, index: Tensor | None) -> None:
    patches.grad = texts.grad = None
    compatibility(patches, texts, attn_temperature=0.07, form=form, text_index=index).backward(grad)


def fixed_costs(options: argparse.Namespace, dtype: torch.dtype, index: Tensor) -> dict[str, Callable[[], Any]]:
    """Return the parts of a step with lists that take no part in the products, each as a function."""
    patches = torch.ones(options.batch, options.patches, options.dim, dtype=dtype)
    texts = torch.ones(options.texts, options.dim, dtype=dtype)
    phi = torch.ones(index.shape)
    return {
        "pages of the patches' gradient": lambda: torch.empty_like(patches).fill_(0.0),
        "one read of the patches": lambda: patches.view(torch.int32).amax(),  # a sum of integers has no vectors
        "listed texts gathered": lambda: [texts[row] for row in index],
        "lists as the kernels take them": lambda: lists_of(index),
        "columns of the loss": lambda: column_sums(phi, phi, index, options.texts),
    }


def measure(options: argparse.Namespace, form: str, name: str) -> dict[str, Any]:
    dtype, clock = getattr(torch, name), CLOCKS[options.clock]
    generator = torch.Generator().manual_seed(0)
    sizes = (options.batch, options.patches, options.dim), (options.texts, options.dim)
    patches, texts = (torch.randn(size, generator=generator).to(dtype).requires_grad_() for size in sizes)
    index = torch.rand(options.batch, options.texts, generator=generator).argsort(1)[:, : options.listed].contiguous()
    grads = {
        "all": torch.randn(options.batch, options.texts, generator=generator),
        "listed": torch.randn(index.shape, generator=generator),
    }
    one, one_grad = index[:, :1].contiguous(), grads["listed"][:, :1].contiguous()
    parts = fixed_costs(options, dtype, index)
    parts |= {
        "all": lambda: step(patches, texts, grads["all"], form, None),
        "one text in each list": lambda: step(patches, texts, one_grad, form, one),
        "listed": lambda: step(patches, texts, grads["listed"], form, index),
    }
    best: dict[str, float] = {}
    for _ in range(options.repeats):
        for part, run in parts.items():
            begin = clock()
            run()
            seconds = clock() - begin
            best[part] = min(best.get(part, seconds), seconds)
    row = {
        "form": form,
        "dtype": name,
        "seconds": {part: round(best.pop(part), 4) for part in ("all", "listed")},
        "fixed_seconds": {part: round(seconds, 4) for part, seconds in best.items()},
    }
    row["listed_to_all"] = round(row["seconds"]["listed"] / row["seconds"]["all"], 4)
    row["share_of_pairs"] = options.listed / options.texts
    print(json.dumps(row, ensure_ascii=False), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256, help="Images.")
    parser.add_argument("--texts", type=int, default=4096)
    parser.add_argument("--listed", type=int, default=64, help="Texts in a list.")
    parser.add_argument("--patches", type=int, default=196)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--forms", nargs="+", default=["dot", "cosine", "max"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5, help="Repeats, of which the shortest counts.")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="Time of day, or of all threads of the process."
    )
    parser.add_argument("--threads", type=int, help="Number of threads (default: torch's).")
    parser.add_argument("--json", type=Path, help="File for the results.")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    rows = [measure(options, form, dtype) for form, dtype in itertools.product(options.forms, options.dtypes)]
    given = {name: value for name, value in vars(options).items() if name not in ("json", "forms", "dtypes")}
    result = {"machine": report.machine(torch.device("cpu"), native()), **given, "rows": rows}
    if options.json:
        options.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
