"""Time candidate configurations of the Triton kernels on this GPU and print what would replace the shipped ones.

    python benchmarks/tune_triton.py --json tuning.json          # bfloat16, B = K = 4096, N = 196, D = 512
    python benchmarks/tune_triton.py --kernels norm_term

The library never tunes itself: `CONFIGS`, `NORM_TERM` and `GRAM_ATTENTION` in pacl_kernels/backends/gpu/tiles.py are
filled by hand from these results. The norm term is timed with an attention in float16 and with one in bfloat16, as in
backend `cuda`. Results from before 2026-11-29 call the norm term "curvature", the products with the Gram matrix "pool"
and the weights "backward".
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import report
import torch
from torch import Tensor

from pacl_kernels.backends.gpu import order, tiles, workspace
from pacl_kernels.backends.gpu.problem import Block, Problem, Upstream
from pacl_kernels.backends.gpu.triton import TritonLaunches

# Texts, patches, step along D, warps, stages, programs per multiprocessor.
CANDIDATES = [
    *itertools.product((128,), (128,), (64,), (4,), (3,), (1, 2)),
    *itertools.product((128,), (128,), (64,), (8,), (3, 4), (1,)),
    *itertools.product((256,), (128,), (64,), (8,), (3, 4), (1,)),
    *itertools.product((128,), (256,), (64,), (8,), (3, 4), (1,)),
    *itertools.product((64,), (256,), (64,), (4,), (3,), (1,)),
    *itertools.product((64,), (128,), (64,), (4,), (3,), (2, 3)),
    *itertools.product((128,), (64,), (64,), (4,), (3, 4), (2,)),
    *itertools.product((128,), (128,), (32,), (4, 8), (4, 6), (1, 2)),
]

# Side of a tile, step along the texts, warps, stages, register limit.
NORM_TERM_CANDIDATES = [
    (64, 32, 4, 3, 0),
    (64, 64, 4, 3, 0),
    (64, 64, 4, 4, 0),
    (64, 128, 4, 3, 0),
    (128, 32, 4, 4, 0),
    (128, 32, 8, 4, 0),
    (128, 32, 8, 3, 128),
    (128, 32, 8, 4, 128),
    (128, 64, 4, 4, 0),
    (128, 64, 8, 2, 128),
    (128, 64, 8, 3, 0),
    (128, 64, 8, 3, 128),
    (128, 64, 8, 4, 0),
    (128, 128, 8, 3, 0),
]

# Texts, patches, step along the other patches, warps, stages.
GRAM_ATTENTION_CANDIDATES = [
    (64, 64, 64, 4, 3),
    (64, 128, 64, 4, 3),
    (64, 128, 64, 8, 3),
    (64, 256, 32, 8, 3),
    (64, 256, 64, 8, 2),
    (64, 256, 64, 8, 3),
    (64, 256, 64, 8, 4),
    (128, 128, 64, 8, 3),
    (128, 256, 64, 8, 3),
]


def milliseconds(function, repeats: int) -> float:
    """Return the median milliseconds of single launches, each after a sweep of the cache."""
    sweep = torch.empty(2**28, dtype=torch.int8, device="cuda")
    times = []
    for turn in range(repeats + 1):
        sweep.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        if turn:  # the first one compiles
            times.append(start.elapsed_time(end))
    return statistics.median(times)


class Run(NamedTuple):
    """Launch for `images` of the batch, and the table entry that selects its configuration."""

    launch: Callable[[], object]
    images: int
    table: dict
    key: tuple
    candidates: list


def score_runs(p: Problem, grad_phi: Tensor, architecture: int) -> dict[str, Run]:
    launches, dtype = TritonLaunches(p), p.patches.dtype
    images = workspace.plan_blocks(p.b, p.n, p.k, dtype.itemsize).images
    w = p.patches.new_empty(p.k + 256, images * p.n + 256)
    block, upstream = Block(0, images, 0, p.k), Upstream(grad_phi, None, needs_temperature=False)
    candidates = [tiles.Config(*values) for values in CANDIDATES]

    def run(kernel: str, images: int, launch) -> Run:
        return Run(launch, images, tiles.CONFIGS, (kernel, architecture, dtype.itemsize), candidates)

    return {
        "forward": run("forward", p.b, launches.dot_forward),
        "weights": run("weights", images, functools.partial(launches.dot_weights, block, upstream, w)),
    }


def cosine_block(p: Problem) -> tuple[workspace.BlockSize, Block]:
    """Return a block of images like those in the backward pass of the cosine form."""
    size = workspace.plan_blocks(p.b, p.n, p.k, workspace.score_bytes(p, "cosine"))
    return size, Block(0, size.images, 0, size.texts)


def norm_term_runs(p: Problem, architecture: int) -> dict[str, Run]:
    """Make the norm term's run for a block of images; values do not matter, so the attention is noise."""
    launches, dtype = TritonLaunches(p), p.patches.dtype
    size, block = cosine_block(p)
    norm_factor = torch.randn(block.images * block.texts, device=p.patches.device)
    norm_term = workspace.norm_term(p, size, dtype)

    def run(attention_dtype: torch.dtype) -> Run:
        attention = workspace.attention(p, size, attention_dtype).uniform_(0, 0.01)
        candidates = [tiles.NormTerm(*values) for values in NORM_TERM_CANDIDATES]
        launch = functools.partial(launches.norm_term, block, attention, norm_factor, norm_term)
        return Run(launch, block.images, tiles.NORM_TERM, (architecture, dtype.itemsize), candidates)

    if dtype == torch.float32:
        return {"norm term": run(dtype)}
    return {"norm term": run(p.gram_dtype), "norm term, bf16": run(torch.bfloat16)}


def gram_attention_runs(p: Problem, grad_phi: Tensor, architecture: int) -> dict[str, Run]:
    """Make the run of the products with the Gram matrix, for a block of images, without the attention."""
    launches = TritonLaunches(p)
    size, block = cosine_block(p)
    attention, gram = workspace.attention(p, size, launches.attention_dtype), workspace.gram(p, size)
    attention[:, :, : p.n] = 1 / p.n
    launches.gram(block, gram)
    w = workspace.weights(p, size, launches.weights_tile("cosine", needs_temperature=False))
    norm_factor = torch.empty(block.images * block.texts, device=p.patches.device)
    upstream = Upstream(grad_phi, None, needs_temperature=False)
    calls = {
        "forward": functools.partial(launches.cosine_forward_from_attention, block, attention, gram),
        "weights": functools.partial(
            launches.cosine_weights_from_attention, block, upstream, attention, gram, w, norm_factor
        ),
    }
    candidates = [tiles.GramAttention(*values) for values in GRAM_ATTENTION_CANDIDATES]
    return {
        f"gram attention, {kernel}": Run(
            *(call, block.images, tiles.GRAM_ATTENTION, (kernel, architecture, p.patches.element_size()), candidates)
        )
        for kernel, call in calls.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4096, help="Number of images, and of texts.")
    parser.add_argument("--patches", type=int, default=196, help="Patches per image.")
    parser.add_argument("--dim", type=int, default=512, help="Dimension of the embeddings.")
    parser.add_argument("--repeats", type=int, default=7, help="Timed launches of each candidate.")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="Dtype of the inputs."
    )
    parser.add_argument(
        "--kernels", choices=("scores", "norm_term", "gram_attention", "all"), default="all", help="Kernels to tune."
    )
    parser.add_argument("--json", metavar="FILE", help="Write the rows, with a description of the machine.")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    patches = torch.randn(args.batch, args.patches, args.dim, device="cuda", dtype=dtype)
    texts = torch.randn(args.batch, args.dim, device="cuda", dtype=dtype)
    phi, state, grad_phi = (torch.empty(args.batch, args.batch, device="cuda") for _ in range(3))
    problem = order.prepare(patches, texts, None, 0.07, phi, state)
    images = workspace.plan_blocks(args.batch, args.patches, args.batch, dtype.itemsize).images
    rows = patches[:images].flatten(0, 1)
    product_out = torch.empty(args.batch, len(rows), device="cuda", dtype=dtype)
    product = milliseconds(lambda: torch.mm(texts, rows.T, out=product_out), args.repeats) / images
    runs = {}
    if args.kernels != "norm_term":  # "gram_attention" reads their state
        TritonLaunches(problem).dot_forward()
        grad_phi.normal_()
    if args.kernels in ("gram_attention", "all"):
        architecture = tiles.newest({a for _, a, _ in tiles.GRAM_ATTENTION}, patches.device)
        runs |= gram_attention_runs(problem, grad_phi, architecture)
    if args.kernels in ("norm_term", "all"):
        runs |= norm_term_runs(problem, tiles.newest({a for a, _ in tiles.NORM_TERM}, patches.device))
    if args.kernels in ("scores", "all"):
        runs |= score_runs(problem, grad_phi, tiles.newest({a for _, a, _ in tiles.CONFIGS}, patches.device))
    results = []
    for kernel, run in runs.items():
        shipped = run.table[run.key]
        for candidate in dict.fromkeys([shipped, *run.candidates]):
            run.table[run.key] = candidate
            try:
                ms = milliseconds(run.launch, args.repeats) / run.images
                ratio, reason = product / ms, None
            except Exception as error:  # such as too much shared memory
                ms, ratio, reason = None, None, f"{type(error).__name__}: {str(error).splitlines()[0]}"[:100]
            finally:
                run.table[run.key] = shipped
            results.append(
                {
                    "kernel": kernel,
                    "config": list(candidate),
                    "shipped": candidate == shipped,
                    "us_per_image": ms and 1e3 * ms,
                    "ms_for_the_batch": ms and args.batch * ms,
                    "share_of_product": ratio,
                    "reason": reason,
                }
            )
            outcome = f"failed: {reason}" if reason else f"{args.batch * ms:8.3f} ms  {ratio:.3f} of torch.mm"
            print(f"{kernel:23} {tuple(candidate)!s:30} {outcome}", flush=True)
            if args.json:  # after each row, because compiling takes most of the time and a run may be interrupted
                machine = report.machine(torch.device("cuda"), None)
                Path(args.json).write_text(
                    json.dumps({"machine": machine, "settings": vars(args), "rows": results}, indent=1)
                )


if __name__ == "__main__":
    main()
