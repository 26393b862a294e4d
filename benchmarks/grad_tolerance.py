"""Time of a step with `grad_tolerance` beside the exact step, and the errors of its gradients, on a CPU.

Embeddings are such that the logits of other pairs scatter by a given standard deviation, and the mean probability of
the own text is one half. The exact step is timed at the first of the scatters, because it does the same work at all.
Errors are relative, against float64, beside those of the exact step in the same dtype; they are those of a few images
with all texts.

    python benchmarks/grad_tolerance.py --json benchmarks/results/DATE-MACHINE-grad-tolerance.json  # rerun to resume
    python benchmarks/grad_tolerance.py --batch 4096 --scatters 3 5 --repeats 1 --json FILE    # 6 minutes, 9 GB
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import time
from pathlib import Path
from typing import Any

import report
import torch
from outputs import write_json
from torch import Tensor
from torch.nn import functional as F

from pacl_kernels import compatibility, fused_pacl_loss, kept_pairs
from pacl_kernels.native import native

SHAPE = ("batch", "patches", "dim")
SETTINGS = (*SHAPE, "tolerance", "repeats", "scatters", "checked")
PRODUCT_IMAGES = 1024  # of the bare product, which is a loop over images


@functools.cache
def drawn(batch: int, n: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return texts `[B, D]`, images `[B, D]` and the noise of patches `[B, N, D]`."""
    generator = torch.Generator().manual_seed(0)
    texts, images = (F.normalize(torch.randn(batch, dim, generator=generator), dim=-1) for _ in range(2))
    return texts, images, torch.randn(batch, n, dim, generator=generator).div_(math.sqrt(dim))


def patches_of(shape: tuple[int, int, int], share: float, count: int) -> Tensor:
    """Return patches `[count, N, D]` of the first images, with a share of their own text."""
    texts, images, noise = drawn(*shape)
    return noise[:count] + (images + share * texts)[:count, None]


@functools.cache
def share_and_scale(shape: tuple[int, int, int], scatter: float) -> tuple[float, float]:
    """Return the share of the own text in an image, and the logit scale, by bisection."""
    texts = drawn(*shape)[0]
    sample, low, high, scale = min(len(texts), 64), 0.0, 2.0, 1.0
    others = ~torch.eye(sample, len(texts), dtype=torch.bool)
    for _ in range(14):
        share = (low + high) / 2
        phi = compatibility(patches_of(shape, share, sample), texts)
        scale = scatter / float(phi[others].std())
        own = (scale * phi).softmax(-1).diagonal().mean()
        low, high = (share, high) if own < 0.5 else (low, share)
    return share, scale


def step(patches: Tensor, texts: Tensor, scale: float, tolerance: float, **pairs: Tensor) -> tuple[float, Tensor]:
    """Return the seconds of forward and backward, and the loss."""
    patches.grad = texts.grad = None
    begin = time.perf_counter()
    loss = fused_pacl_loss(patches, texts, scale, grad_tolerance=tolerance, **pairs)
    loss.backward()
    return time.perf_counter() - begin, loss


def bare_product(patches: Tensor, texts: Tensor) -> float:
    """Return the seconds of the product of all patches and texts, timed on some of the images."""
    rows = patches.detach()[:PRODUCT_IMAGES].flatten(0, 1)
    begin = time.perf_counter()
    for part in rows.split(8192):
        torch.mm(part, texts.detach().T)
    return (time.perf_counter() - begin) * max(1.0, len(patches) / PRODUCT_IMAGES)


def errors(options: argparse.Namespace, scatter: float, dtype: torch.dtype) -> dict[str, Any]:
    """Return the relative errors of the gradients of a few images and all texts, exact and with the tolerance."""
    shape, count = tuple(getattr(options, name) for name in SHAPE), min(options.checked, options.batch)
    share, scale = share_and_scale(shape, scatter)
    rows = patches_of(shape, share, count), drawn(*shape)[0]
    given = [x.to(dtype, copy=True).requires_grad_() for x in rows]
    wide = [x.detach().double().requires_grad_() for x in given]
    ids = torch.arange(options.batch)  # those beyond the images belong to none
    step(*wide, scale, 0.0, text_ids=ids)
    found = {}
    for name, value in (("exact", 0.0), ("tolerance", options.tolerance)):
        _, loss = step(*given, scale, value, text_ids=ids)
        kept = kept_pairs(loss)
        for kind, x, y in zip(("patches", "texts"), given, wide, strict=True):
            found[f"{kind}, {name}"] = float((x.grad.double() - y.grad).norm() / y.grad.norm())
    return {"images": count, "kept_share": round(kept.share, 4) if kept else 1.0, "relative_error": found}


def measure(options: argparse.Namespace, dtype: torch.dtype, frozen: bool) -> list[dict[str, Any]]:
    """Return a row for each scatter; product and exact step take turns with the steps that have a tolerance."""
    shape = tuple(getattr(options, name) for name in SHAPE)
    texts = drawn(*shape)[0].to(dtype, copy=True).requires_grad_(not frozen)
    found = [share_and_scale(shape, scatter) for scatter in options.scatters]
    batches = [patches_of(shape, share, options.batch).to(dtype).requires_grad_() for share, _ in found]
    product, exact = [], []
    times: list[list[float]] = [[] for _ in found]
    kept: list[Any] = [None for _ in found]
    for _ in range(options.repeats):
        product.append(bare_product(batches[0], texts))
        exact.append(step(batches[0], texts, found[0][1], 0.0)[0])
        for i, (patches, (_, scale)) in enumerate(zip(batches, found, strict=True)):
            seconds, loss = step(patches, texts, scale, options.tolerance)
            times[i].append(seconds)
            kept[i] = kept_pairs(loss)
            patches.grad = None
    rows = []
    for i, scatter in enumerate(options.scatters):
        best = {"product": min(product), "exact": min(exact), "tolerance": min(times[i])}
        rows.append(
            {
                "scatter": scatter,
                "dtype": str(dtype).removeprefix("torch."),
                "frozen_texts": frozen,
                "logit_scale": round(found[i][1], 1),
                "kept_share": round(kept[i].share, 4) if kept[i] else 1.0,
                "seconds": {name: round(value, 4) for name, value in best.items()},
                "exact_in_products": round(best["exact"] / best["product"], 2),
                "tolerance_in_products": round(best["tolerance"] / best["product"], 2),
                "tolerance_to_exact": round(best["tolerance"] / best["exact"], 3),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def resumed(path: Path | None, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the result that the file holds, or an empty one."""
    if path is None or not path.exists():
        return {"machine": report.machine(torch.device("cpu"), native()), **settings, "rows": [], "accuracy": []}
    result: dict[str, Any] = json.loads(path.read_text())
    for name, value in settings.items():
        if result.get(name) != value:
            raise SystemExit(f"grad_tolerance: {path} has {name} {result.get(name)}, expected {value}, or another file")
    return result


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1024, help="Images, and texts.")
    parser.add_argument("--patches", type=int, default=196)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--tolerance", type=float, default=2**-9)
    parser.add_argument("--scatters", type=float, nargs="+", default=[3.0, 4.0, 5.0])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=3, help="Repeats, of which the shortest counts.")
    parser.add_argument("--checked", type=int, default=64, help="Images whose gradients are compared with float64.")
    parser.add_argument("--json", type=Path, help="File for the results; what it has already is not measured again.")
    options = parser.parse_args(argv)
    result = resumed(options.json, {name: getattr(options, name) for name in SETTINGS})

    def add(kind: str, found: list[dict[str, Any]]) -> None:
        result[kind] += found
        if options.json:
            write_json(options.json, result)

    for name in options.dtypes:
        dtype = getattr(torch, name)
        for frozen in (True, False):
            if not any(row["dtype"] == name and row["frozen_texts"] == frozen for row in result["rows"]):
                add("rows", measure(options, dtype, frozen))
        for scatter in options.scatters:
            if not any(row["dtype"] == name and row["scatter"] == scatter for row in result["accuracy"]):
                found = {"scatter": scatter, "dtype": name, **errors(options, scatter, dtype)}
                print(json.dumps(found), flush=True)
                add("accuracy", [found])


if __name__ == "__main__":
    main()
