"""Time of a step with `grad_tolerance` beside the exact step, and the errors of its gradients, on a CPU.

Embeddings are such that the logits of other pairs scatter by a given standard deviation, and the mean probability of
the own text is one half. Errors are relative, against float64, beside those of the exact step in the same dtype.

    python benchmarks/grad_tolerance.py --batch 1024 --json benchmarks/results/DATE-MACHINE-grad-tolerance.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import report
import torch
from torch import Tensor
from torch.nn import functional as F

from pacl_kernels import compatibility, fused_pacl_loss, kept_pairs
from pacl_kernels.native import native


def embeddings(batch: int, n: int, dim: int, scatter: float) -> tuple[Tensor, Tensor, float]:
    """Return patches `[B, N, D]`, texts `[B, D]` and the logit scale."""
    generator = torch.Generator().manual_seed(0)
    texts, images = (F.normalize(torch.randn(batch, dim, generator=generator), dim=-1) for _ in range(2))
    noise = torch.randn(batch, n, dim, generator=generator) / math.sqrt(dim)
    sample, low, high = min(batch, 64), 0.0, 2.0
    for _ in range(14):  # bisection of the share of the own text in an image
        share = (low + high) / 2
        patches = (images + share * texts)[:sample, None] + noise[:sample]
        phi = compatibility(patches, texts)
        others = phi[~torch.eye(sample, batch, dtype=torch.bool)]
        scale = scatter / float(others.std())
        own = (scale * phi).softmax(-1).diagonal().mean()
        low, high = (share, high) if own < 0.5 else (low, share)
    return (images + share * texts)[:, None] + noise, texts, scale


def step(patches: Tensor, texts: Tensor, scale: float, tolerance: float) -> tuple[float, float, Tensor]:
    """Return the seconds of forward and backward, and the loss."""
    patches.grad = texts.grad = None
    begin = time.perf_counter()
    loss = fused_pacl_loss(patches, texts, scale, grad_tolerance=tolerance)
    middle = time.perf_counter()
    loss.backward()
    return middle - begin, time.perf_counter() - middle, loss


def bare_product(patches: Tensor, texts: Tensor) -> float:
    rows = patches.detach().flatten(0, 1)
    begin = time.perf_counter()
    for part in rows.split(8192):
        torch.mm(part, texts.detach().T)
    return time.perf_counter() - begin


def errors(batch: int, n: int, dim: int, scatter: float, dtype: torch.dtype, tolerance: float) -> dict[str, Any]:
    """Return the relative errors of the gradients, exact and with the tolerance."""
    patches, texts, scale = embeddings(batch, n, dim, scatter)
    given = [x.to(dtype).requires_grad_() for x in (patches, texts)]
    wide = [x.detach().double().requires_grad_() for x in given]
    fused_pacl_loss(*wide, scale).backward()
    found = {}
    for name, value in (("exact", 0.0), ("tolerance", tolerance)):
        step(*given, scale, value)
        for kind, x, y in zip(("patches", "texts"), given, wide, strict=True):
            found[f"{kind}, {name}"] = float((x.grad.double() - y.grad).norm() / y.grad.norm())
    return found


def measure(options: argparse.Namespace, scatter: float, dtype: torch.dtype, frozen: bool) -> dict[str, Any]:
    patches, texts, scale = embeddings(options.batch, options.patches, options.dim, scatter)
    patches, texts = patches.to(dtype).requires_grad_(), texts.to(dtype).requires_grad_(not frozen)
    times: dict[str, list[float]] = {"product": [], "exact": [], "tolerance": []}
    kept = None
    for _ in range(options.repeats):
        times["product"].append(bare_product(patches, texts))
        for name, value in (("exact", 0.0), ("tolerance", options.tolerance)):
            forward, backward, loss = step(patches, texts, scale, value)
            times[name].append(forward + backward)
            kept = kept_pairs(loss) or kept
    assert kept is not None
    best = {name: min(values) for name, values in times.items()}
    row = {
        "scatter": scatter,
        "dtype": str(dtype).removeprefix("torch."),
        "frozen_texts": frozen,
        "logit_scale": round(scale, 1),
        "kept_share": round(kept.share, 4),
        "seconds": {name: round(value, 4) for name, value in best.items()},
        "exact_in_products": round(best["exact"] / best["product"], 2),
        "tolerance_in_products": round(best["tolerance"] / best["product"], 2),
        "tolerance_to_exact": round(best["tolerance"] / best["exact"], 3),
    }
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1024, help="images and texts")
    parser.add_argument("--patches", type=int, default=196)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--tolerance", type=float, default=2**-9)
    parser.add_argument("--scatters", type=float, nargs="+", default=[3.0, 4.0, 5.0])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=3, help="the least time of these counts")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    rows, accuracy = [], []
    for scatter, name in itertools.product(options.scatters, options.dtypes):
        dtype = getattr(torch, name)
        small = min(options.batch, 256)  # float64 takes long
        found = errors(small, options.patches, options.dim, scatter, dtype, options.tolerance)
        accuracy.append({"scatter": scatter, "dtype": name, "batch": small, "relative_error": found})
        print(json.dumps(accuracy[-1]), flush=True)
        rows += [measure(options, scatter, dtype, frozen) for frozen in (True, False)]
    shape = {name: getattr(options, name) for name in ("batch", "patches", "dim", "tolerance", "repeats")}
    result = {"machine": report.machine(torch.device("cpu"), native()), **shape, "rows": rows, "accuracy": accuracy}
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
