"""Time the Hopper kernels against cuBLAS and the Triton kernels on this GPU, to decide which of them `auto` takes.

    python benchmarks/tune_cuda.py --json tuning.json          # bfloat16, B = K = 4096, D = 512 and more, common N

One unit is the product of all patches with all texts. `share` is torch.mm's time for the same tensors divided by the
kernel's.
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path

import report
import torch
from tune_triton import milliseconds

from pacl_kernels import fused_pacl_loss
from pacl_kernels.backends.gpu import hopper, order, triton, workspace
from pacl_kernels.backends.gpu.problem import Block, Upstream

SHAPES = [(4096, n, d) for d in (512, 768, 1024) for n in (196, 256)] + [
    (4096, 49, 512),
    (2048, 576, 768),
    (512, 196, 512),
]


def rows_of(batch: int, n: int, d: int, dtype, repeats: int):
    """Yield the milliseconds of each kernel and of whole steps for the whole batch, by backend and cluster size."""
    patches = torch.nn.functional.normalize(torch.randn(batch, n, d, device="cuda"), dim=-1).to(dtype)
    texts = torch.nn.functional.normalize(torch.randn(batch, d, device="cuda"), dim=-1).to(dtype)
    phi, state, grad_phi = (torch.empty(batch, batch, device="cuda") for _ in range(3))
    images = workspace.plan_blocks(batch, n, batch, dtype.itemsize).images
    room = torch.empty(batch + 256, images * n + 256, device="cuda", dtype=dtype)
    out = torch.empty(batch, images * n, device="cuda", dtype=dtype)
    flat = patches[:images].flatten(0, 1)
    product = milliseconds(lambda: torch.mm(texts, flat.T, out=out), repeats) * batch / images
    yield "product", "torch.mm", None, product, product
    leaves = patches.requires_grad_(), texts.requires_grad_()
    ways = [("triton", None, False), ("cuda", 1, False), ("cuda", 2, False)]
    if not hopper.native().cuda_fits_one_tile(n):
        ways.append(("cuda", 2, True))
    for name, cluster, own in ways:
        hopper.settings.cluster, hopper.settings.cosine_from_attention = cluster or 0, own
        problem = order.prepare(patches.detach(), texts.detach(), None, 0.07, phi, state)
        launches = triton.TritonLaunches(problem) if name == "triton" else hopper.HopperLaunches(problem)
        launches.dot_forward()
        grad_phi.normal_()
        block, upstream = Block(0, images, 0, batch), Upstream(grad_phi, None, needs_temperature=False)

        def step(form: str, name=name):
            loss = fused_pacl_loss(*leaves, 20.0, attn_temperature=0.07, form=form, backend=name)
            return torch.autograd.grad(loss, leaves)

        runs = {"forward": (launches.dot_forward, 1)}
        if cluster != 1:
            runs |= {
                "weights": (functools.partial(launches.dot_weights, block, upstream, room), batch / images),
                "cosine": (functools.partial(order.forward, problem, launches, "cosine"), 1),
                "step, dot": (lambda: step("dot"), 1),  # noqa: B023
                "step, cosine": (lambda: step("cosine"), 1),  # noqa: B023
            }
        if own:
            runs = {kernel: run for kernel, run in runs.items() if "cosine" in kernel}
        label = f"{name}, attention in memory" if own else name
        for kernel, (run, times) in runs.items():
            try:
                yield kernel, label, cluster, milliseconds(run, repeats) * times, product
            except Exception as error:  # report it and time the others
                print(f"{kernel} {name} {cluster}: {type(error).__name__}: {error}", flush=True)
    hopper.settings.cluster, hopper.settings.cosine_from_attention = 0, None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7, help="Timed launches of each kernel.")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16", help="Dtype of the inputs.")
    parser.add_argument("--json", metavar="FILE", help="Write the rows, with a description of the machine.")
    parser.add_argument("--shapes", help="Shapes BxNxD, separated by commas (default: common shapes).")
    args = parser.parse_args()
    shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes.split(",")] if args.shapes else SHAPES
    results = []
    for batch, n, d in shapes:
        for kernel, backend, cluster, ms, product in rows_of(batch, n, d, getattr(torch, args.dtype), args.repeats):
            teraflops = 2 * batch * batch * n * d / ms / 1e9
            row = dict(batch=batch, patches=n, dim=d, kernel=kernel, backend=backend, cluster=cluster, ms=ms)
            results.append(row | dict(share=product / ms, teraflops=teraflops))
            name = f"{backend}{f', cluster {cluster}' if cluster else ''}"
            speed = f"{teraflops:6.0f} TFLOP/s {product / ms:.3f} of torch.mm"
            print(f"B{batch} N{n} D{d} {kernel:12} {name:16} {ms:9.3f} ms {speed}", flush=True)
            if args.json:  # after each row, because a run may be interrupted
                machine = report.machine(torch.device("cuda"), None)
                Path(args.json).write_text(
                    json.dumps({"machine": machine, "settings": vars(args), "rows": results}, indent=1)
                )


if __name__ == "__main__":
    main()
