"""Times candidate configurations of the Triton kernels on this GPU and prints what would replace the shipped ones.

    python benchmarks/tune_triton.py --json tuning.json          # bfloat16, B = K = 4096, N = 196, D = 512

The library itself never searches: `CONFIGS` in pacl_kernels/backends/triton_tiles.py is filled by hand, from this.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from pathlib import Path

import report
import torch

from pacl_kernels.backends import triton as backend
from pacl_kernels.backends import triton_tiles as tiles

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("batch", 4096), ("patches", 196), ("dim", 512), ("repeats", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--json", metavar="FILE", help="write the rows, with the machine they are from")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    patches = torch.randn(args.batch, args.patches, args.dim, device="cuda", dtype=dtype)
    texts = torch.randn(args.batch, args.dim, device="cuda", dtype=dtype)
    phi, stat, grad_phi = (torch.empty(args.batch, args.batch, device="cuda") for _ in range(3))
    call = backend.Call(patches, texts, None, 0.07, phi, stat)
    call.scale = None
    block = tiles.plan_blocks(args.batch, args.patches, args.batch, dtype.itemsize)
    room = torch.empty(args.batch + 256, block.images * args.patches + 256, device="cuda", dtype=dtype)
    rows = patches[: block.images].flatten(0, 1)
    product_out = torch.empty(args.batch, len(rows), device="cuda", dtype=dtype)
    product = milliseconds(lambda: torch.mm(texts, rows.T, out=product_out), args.repeats) / block.images
    call.scores("dot")
    grad_phi.normal_()
    runs = {
        "forward": (lambda: call.scores("dot"), args.batch),
        "backward": (lambda: call.weights(0, block.images, 0, args.batch, room, grad_phi), block.images),
    }
    architecture = max(a for _, a, _ in tiles.CONFIGS if a <= tiles.architecture(patches.device))
    results = []
    for kernel, (run, images) in runs.items():
        key = (kernel, architecture, dtype.itemsize)
        shipped = tiles.CONFIGS[key]
        for candidate in [shipped, *(tiles.Config(*values) for values in CANDIDATES)]:
            tiles.CONFIGS[key] = candidate
            try:
                ms = milliseconds(run, args.repeats) / images
                ratio, reason = product / ms, None
            except Exception as error:  # too much shared memory, say
                ms, ratio, reason = None, None, f"{type(error).__name__}: {str(error).splitlines()[0]}"[:100]
            finally:
                tiles.CONFIGS[key] = shipped
            results.append(
                {
                    "kernel": kernel,
                    "config": list(candidate),
                    "shipped": candidate is shipped,
                    "us_per_image": ms and 1e3 * ms,
                    "share_of_product": ratio,
                    "reason": reason,
                }
            )
            print(
                f"{kernel:9} {tuple(candidate)!s:30} {'failed: ' + reason if reason else f'{ratio:.3f} of torch.mm'}",
                flush=True,
            )
    if args.json:
        machine = report.machine(torch.device("cuda"), None)
        Path(args.json).write_text(json.dumps({"machine": machine, "settings": vars(args), "rows": results}, indent=1))


if __name__ == "__main__":
    main()
