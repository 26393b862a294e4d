"""Times candidate configurations of the Triton kernels on this GPU and prints what would replace the shipped ones.

    python benchmarks/tune_triton.py --json tuning.json          # bfloat16, B = K = 4096, N = 196, D = 512
    python benchmarks/tune_triton.py --kernels curvature

The library itself never searches: `CONFIGS`, `CURVATURE` and `POOL` in pacl_kernels/backends/gpu/tiles.py are
filled by hand, from this. The curvature is timed from an attention in float16 and from one in bfloat16, as backend
`cuda` has it.
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

from pacl_kernels.backends.gpu import tiles
from pacl_kernels.backends.gpu import triton as backend

# Texts, patches, step along D, warps, stages, programs for each multiprocessor.
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

# Side of a tile, step along the texts, warps, stages, limit of registers.
CURVATURE_CANDIDATES = [
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
POOL_CANDIDATES = [
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
    """Median of single launches, each behind a sweep of the cache."""
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
    """A launch for `images` of the batch, and the entry of a table that chooses its configuration."""

    launch: Callable[[], object]
    images: int
    table: dict
    key: tuple
    candidates: list


def score_runs(call: backend.Call, grad_phi: Tensor, architecture: int) -> dict[str, Run]:
    dtype = call.patches.dtype
    block = tiles.plan_blocks(call.b, call.n, call.k, dtype.itemsize)
    room = call.patches.new_empty(call.k + 256, block.images * call.n + 256)
    candidates = [tiles.Config(*values) for values in CANDIDATES]

    def run(kernel: str, images: int, launch) -> Run:
        return Run(launch, images, tiles.CONFIGS, (kernel, architecture, dtype.itemsize), candidates)

    return {
        "forward": run("forward", call.b, lambda: call.scores("dot")),
        "backward": run("backward", block.images, lambda: call.weights(0, block.images, 0, call.k, room, grad_phi)),
    }


def curvature_runs(call: backend.Call, architecture: int) -> dict[str, Run]:
    """For a block of images as the backward takes it; numbers do not matter, so the attention is noise."""
    dtype = call.patches.dtype
    block = tiles.plan_blocks(call.b, call.n, call.k, dtype.itemsize + call.attention_dtype.itemsize)
    images, texts = block
    factors = torch.randn(images * texts, device=call.patches.device)
    pooled = call.pooled_workspace(block, dtype)

    def run(attention_dtype: torch.dtype) -> Run:
        attention = call.attention_workspace(block, attention_dtype).uniform_(0, 0.01)
        candidates = [tiles.Curvature(*values) for values in CURVATURE_CANDIDATES]
        launch = functools.partial(call.curvature, 0, images, 0, texts, attention, factors, pooled)
        return Run(launch, images, tiles.CURVATURE, (architecture, dtype.itemsize), candidates)

    if dtype == torch.float32:
        return {"curvature": run(dtype)}
    return {"curvature": run(call.attention_dtype), "curvature, bf16": run(torch.bfloat16)}


def pool_runs(call: backend.Call, grad_phi: Tensor, architecture: int) -> dict[str, Run]:
    """The products with the Gram matrix, for a block of images as the backward takes it, without the attention."""
    block = tiles.plan_blocks(call.b, call.n, call.k, call.patches.element_size() + call.attention_dtype.itemsize)
    images, texts = block
    attention = call.attention_workspace(block)
    attention[:, :, : call.n] = 1 / call.n
    gram, w = call.gram_workspace(block), call.workspace(block, call.patches.dtype)
    call.gram(0, images, gram)
    curvature = torch.empty(images * texts, device=call.patches.device)
    call.attention = lambda *_, **__: None
    launches = {
        "forward": lambda: call.cosine_forward(0, images, 0, texts, attention, gram),
        "backward": lambda: call.cosine_weights(
            0, images, 0, texts, attention, gram, grad_phi, w, curvature, needs_tau=False
        ),
    }
    candidates = [tiles.Pool(*values) for values in POOL_CANDIDATES]
    return {
        f"pool {kernel}": Run(
            launch, images, tiles.POOL, (kernel, architecture, call.patches.element_size()), candidates
        )
        for kernel, launch in launches.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("batch", 4096), ("patches", 196), ("dim", 512), ("repeats", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--kernels", choices=("scores", "curvature", "pool", "all"), default="all")
    parser.add_argument("--json", metavar="FILE", help="write the rows, with the machine they are from")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    patches = torch.randn(args.batch, args.patches, args.dim, device="cuda", dtype=dtype)
    texts = torch.randn(args.batch, args.dim, device="cuda", dtype=dtype)
    phi, stat, grad_phi = (torch.empty(args.batch, args.batch, device="cuda") for _ in range(3))
    call = backend.Call(patches, texts, None, 0.07, phi, stat)
    call.scale = None
    images = tiles.plan_blocks(args.batch, args.patches, args.batch, dtype.itemsize).images
    rows = patches[:images].flatten(0, 1)
    product_out = torch.empty(args.batch, len(rows), device="cuda", dtype=dtype)
    product = milliseconds(lambda: torch.mm(texts, rows.T, out=product_out), args.repeats) / images
    runs = {}
    if args.kernels != "curvature":  # "pool" reads their STAT
        call.scores("dot")
        grad_phi.normal_()
    if args.kernels in ("pool", "all"):
        runs |= pool_runs(call, grad_phi, tiles.newest({a for _, a, _ in tiles.POOL}, patches.device))
    if args.kernels in ("curvature", "all"):
        runs |= curvature_runs(call, tiles.newest({a for a, _ in tiles.CURVATURE}, patches.device))
    if args.kernels in ("scores", "all"):
        runs |= score_runs(call, grad_phi, tiles.newest({a for _, a, _ in tiles.CONFIGS}, patches.device))
    results = []
    for kernel, run in runs.items():
        shipped = run.table[run.key]
        for candidate in dict.fromkeys([shipped, *run.candidates]):
            run.table[run.key] = candidate
            try:
                ms = milliseconds(run.launch, args.repeats) / run.images
                ratio, reason = product / ms, None
            except Exception as error:  # too much shared memory, say
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
            print(f"{kernel:17} {tuple(candidate)!s:30} {outcome}", flush=True)
            if args.json:  # after each row: compiling takes most of the time, and a call may be cut off
                machine = report.machine(torch.device("cuda"), None)
                Path(args.json).write_text(
                    json.dumps({"machine": machine, "settings": vars(args), "rows": results}, indent=1)
                )


if __name__ == "__main__":
    main()
