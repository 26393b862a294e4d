"""Find what the Hopper kernels that write W wait for: memory, the path of their stores, or their own arithmetic.

    python benchmarks/cuda_experiments.py --json experiments.json

Each kernel runs as it is, with its rows so close together that the L2 cache holds them, and without stores; the kernel
of the forward, which has the same products and stores next to nothing, is the floor. The differences are the parts of
the time that memory, the path from the registers to L2, and the rest of the epilogue account for. The same kernel with
bulk tensor stores and W transposed, and the library's products with either layout of W, say what another path brings.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import report
import torch
from torch import Tensor
from tune_triton import milliseconds

from pacl_kernels.backends.gpu import hopper, order, workspace
from pacl_kernels.backends.gpu.problem import Block, Problem, Upstream

SHAPES = ((4096, 196, 512), (4096, 256, 768))  # the flagship, and the one that is slow and not understood
PARTS = {  # each the time between two runs
    "memory": ("as it is", "close rows"),
    "the path of the stores": ("close rows", "no stores"),
    "latency and arithmetic of the epilogue": ("no stores", "forward"),
}


def verdict(ms: dict[str, float]) -> tuple[str, dict[str, float]]:
    """Return the largest part of a kernel's time above that of its forward, and all parts in milliseconds."""
    parts = {part: ms[slower] - ms[faster] for part, (slower, faster) in PARTS.items()}
    return max(parts, key=lambda part: parts[part]), parts


def close(w: Tensor, pitch: int) -> Tensor:
    """Return a view of W whose rows begin `pitch` elements apart, and overlap."""
    return w.as_strided(w.shape, (pitch, 1))


def launches(p: Problem, transposed: bool) -> hopper.HopperLaunches:
    before, hopper.settings.transposed_weights = hopper.settings.transposed_weights, transposed
    try:
        return hopper.HopperLaunches(p)
    finally:
        hopper.settings.transposed_weights = before


def runs_of(p: Problem, form: str) -> Iterator[tuple[str, int, Callable[[], object]]]:
    """Yield the name of a run, the images that it takes, and its launch."""
    size = workspace.backward_blocks(p, form, widened=False)
    block, upstream = Block(0, size.images, 0, size.texts), Upstream(torch.randn_like(p.phi), None, False)
    plain, bulk = launches(p, transposed=False), launches(p, transposed=True)
    w, transposed = (workspace.weights(p, size, of.weights_tile(form, False)) for of in (plain, bulk))
    near, nothing = close(w, -(-p.n // 8) * 8), w.new_empty(0, 8)  # nothing: its address is null
    if form == "dot":
        plain.dot_forward()
        yield "forward", p.b, plain.dot_forward
        for name, of, to in (
            ("as it is", plain, w), ("close rows", plain, near), ("no stores", plain, nothing),
            ("transposed, bulk stores", bulk, transposed),
        ):  # fmt: skip
            yield name, block.images, functools.partial(of.dot_weights, block, upstream, to)
        # The products that follow, with either layout of W.
        rows = p.patches[: block.images].flatten(0, 1)
        for name, of in (("W", w), ("transposed W", transposed)):
            of = of[: p.k, : len(rows)].normal_()
            yield f"product with the texts, {name}", block.images, functools.partial(torch.mm, of.T, p.texts)
            yield f"product with the patches, {name}", block.images, functools.partial(torch.mm, of, rows)
        return
    attention = workspace.attention(p, size, plain.attention_dtype)
    gram, factor = workspace.gram(p, size), p.phi.new_empty(size.images * size.texts)
    plain.gram(block, gram)
    plain.cosine_forward(block, gram)
    yield "forward", block.images, functools.partial(plain.cosine_forward, block, gram)
    near_attention = attention.as_strided(attention.shape, (8 * size.texts, 8, 1))
    for name, of, kept, to in (
        ("as it is", plain, attention, w), ("close rows", plain, near_attention, near),
        ("no stores", plain, attention, nothing), ("transposed, bulk stores", bulk, attention, transposed),
    ):  # fmt: skip
        yield name, block.images, functools.partial(of.cosine_weights, block, upstream, kept, gram, to, factor)


def measure(batch: int, n: int, d: int, form: str, repeats: int) -> dict[str, float]:
    """Return the milliseconds of each run for the whole batch."""
    patches, texts = (torch.randn(batch, *shape, device="cuda").bfloat16() for shape in ((n, d), (d,)))
    phi, state = torch.empty(2, batch, batch, device="cuda")
    p = order.prepare(patches, texts, None, 0.07, phi, state)

    return {name: milliseconds(run, repeats) * batch / images for name, images, run in runs_of(p, form)}


def show(shape: str, form: str, ms: dict[str, float]) -> str:
    """Return the lines of one kernel."""
    largest, parts = verdict(ms)
    lines = [f"{shape}, {form}:"] + [f"  {name:40} {time:8.3f} ms" for name, time in ms.items()]
    lines += [f"  due to {part:33} {time:8.3f} ms" for part, time in parts.items()]
    gain = ms["as it is"] - ms["transposed, bulk stores"]
    return "\n".join([*lines, f"  {largest} holds; bulk stores gain {gain:.3f} ms"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7, help="Timed launches of each run.")
    parser.add_argument("--json", metavar="FILE", help="Write the times, with a description of the machine.")
    args = parser.parse_args()
    if reason := hopper.why_not(torch.device("cuda"), torch.bfloat16):
        parser.error(f"backend 'cuda' cannot run here: {reason}")
    rows = []
    for batch, n, d in SHAPES:
        for form in ("dot", "cosine"):
            ms = measure(batch, n, d, form, args.repeats)
            largest, parts = verdict(ms)
            rows.append(dict(batch=batch, patches=n, dim=d, form=form, ms=ms, parts=parts, verdict=largest))
            print(show(f"B{batch} N{n} D{d}", form, ms), flush=True)
            if args.json:
                machine = report.machine(torch.device("cuda"), None)
                Path(args.json).write_text(
                    json.dumps({"machine": machine, "settings": vars(args), "rows": rows}, indent=1)
                )


if __name__ == "__main__":
    main()
