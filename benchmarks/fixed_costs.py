"""Time the layers of a tiny training step on a CPU, in which the products of the kernels cost nothing.

    python benchmarks/fixed_costs.py [--loss sigmoid] [--json F]          # a few seconds

Each line is the time of one layer without the layers that it calls, in microseconds of one thread: the median of the
steps, and their least. The timers make a step about 20 us longer, so the last line but one is the step without them.
The first step is listed alone, because it loads what is loaded late.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from report import machine

from pacl_kernels import autograd, loss, ops, sigmoid_autograd
from pacl_kernels.backends import cpu
from pacl_kernels.checks import FORMS, LOSSES
from pacl_kernels.native import native

CHECKS = ("check_inputs", "check_not_empty", "check_choice", "check_scalar", "check_pairs", "_options", "keeping")
LAYERS: dict[str, list[tuple[Any, str]]] = {
    "checks of the arguments": [(loss, name) for name in CHECKS] + [(loss.groups, "check"), (loss.groups, "lookup")],
    "autograd, forward": [(loss, "first_output")],
    "autograd, backward": [(autograd.PaclFunction, "backward"), (sigmoid_autograd.SigmoidFunction, "backward")],
    "operators": [(ops, name) for name, x in vars(ops).items() if isinstance(x, torch._ops.OpOverload)],
    "loss over the logits": [(cpu, "loss_forward"), (cpu, "loss_backward")],
    "backend, arguments": [(cpu, name) for name in ("compatibility_forward", "compatibility_backward", "sigmoid_step")],
    "backend, parameters": [(cpu, "_params"), (cpu, "_set_gradients")],
    "backend, workspace and kernels": [(cpu, "_run")],
}
REST = "engine of autograd, and the rest"


class Timers:
    """Nanoseconds that each layer has spent outside of the layers that it called."""

    def __init__(self) -> None:
        self.spent: defaultdict[str, int] = defaultdict(int)
        self._inner = [0]

    def around(self, layer: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function` with its time counted to `layer`."""

        @functools.wraps(function, updated=())
        def timed(*arguments: Any, **named: Any) -> Any:
            self._inner.append(0)
            start = time.perf_counter_ns()
            try:
                return function(*arguments, **named)
            finally:
                whole = time.perf_counter_ns() - start
                self.spent[layer] += whole - self._inner.pop()
                self._inner[-1] += whole

        return timed

    def install(self) -> None:
        """Replace the functions of all layers by timed ones."""
        for layer, functions in LAYERS.items():
            for owner, name in functions:
                timed = self.around(layer, getattr(owner, name))
                setattr(owner, name, staticmethod(timed) if isinstance(owner, type) else timed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4, help="Number of images, and of texts.")
    parser.add_argument("--patches", type=int, default=8, help="Patches per image.")
    parser.add_argument("--dim", type=int, default=16, help="Dimension of the embeddings.")
    parser.add_argument("--form", choices=FORMS, default="dot", help="Form of φ.")
    parser.add_argument("--loss", choices=LOSSES, default="infonce", help="Loss over the logits.")
    parser.add_argument("--steps", type=int, default=3000, help="Number of steps that are timed.")
    parser.add_argument("--json", metavar="FILE", help="Write the rows, with a description of the machine.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    patches = torch.randn(args.batch, args.patches, args.dim).requires_grad_()
    texts = torch.randn(args.batch, args.dim).requires_grad_()
    scale = torch.tensor(10.0).requires_grad_()

    def step() -> None:
        value = loss.fused_pacl_loss(
            patches, texts, scale, attn_temperature=0.1, form=args.form, loss=args.loss, backend="cpu"
        )
        torch.autograd.grad(value, (patches, texts, scale))

    start = time.perf_counter()
    step()
    first = 1e3 * (time.perf_counter() - start)
    bare = _nanoseconds(step, args.steps)
    timers = Timers()
    timers.install()
    whole = timers.around(REST, step)
    steps: dict[str, list[int]] = {layer: [] for layer in (*LAYERS, REST)}
    for _ in range(args.steps):
        timers.spent.clear()
        whole()
        for layer, spent in steps.items():
            spent.append(timers.spent[layer])
    rows = [_row(layer, spent) for layer, spent in steps.items()]
    rows.append(_row("whole step, timed", [sum(x) for x in zip(*steps.values(), strict=True)]))
    rows.append(_row("whole step", bare))
    for row in rows:
        print(f"{row['median_us']:8.1f} {row['least_us']:8.1f} us  {row['layer']}")
    print(f"{first:8.1f} ms           first step")
    if args.json:
        about = {"machine": machine(torch.device("cpu"), native()), "settings": vars(args), "first_step_ms": first}
        Path(args.json).write_text(json.dumps({**about, "rows": rows}, indent=1))


def _nanoseconds(step: Callable[[], None], steps: int) -> list[int]:
    found = []
    for _ in range(steps):
        start = time.perf_counter_ns()
        step()
        found.append(time.perf_counter_ns() - start)
    return found


def _row(layer: str, nanoseconds: list[int]) -> dict[str, Any]:
    return dict(layer=layer, median_us=1e-3 * statistics.median(nanoseconds), least_us=1e-3 * min(nanoseconds))


if __name__ == "__main__":
    main()
