"""Time a step of the Hopper kernels with every combination of their switches, and say which defaults follow.

    python benchmarks/cuda_switches.py --json switches.json

A switch is a field of `Settings` in pacl_kernels/backends/gpu/hopper.py. Its default changes by hand: that of
`transposed_weights` is kTransposedWeights in csrc/cuda/plan.h.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import report
import torch
from tune_triton import milliseconds

from pacl_kernels import fused_pacl_loss
from pacl_kernels.backends.gpu import hopper

SHAPES = ((4096, 196, 512), (4096, 256, 768), (2048, 576, 768), (2048, 729, 768), (4096, 49, 512))
SWITCHES: dict[str, tuple] = {
    "transposed_weights": (False, True),
    "cluster": (1, 2),
    "cosine_from_attention": (False, True),
}
Row = dict[str, Any]


def combinations(form: str, fits_one_tile: bool) -> Iterator[dict[str, Any]]:
    """Yield the settings to time; None where a switch changes nothing."""
    values = dict(SWITCHES)
    if form == "dot" or fits_one_tile:
        values["cosine_from_attention"] = (None,)
    for chosen in itertools.product(*values.values()):
        yield dict(zip(values, chosen, strict=True))


def ratio(rows: list[Row], switch: str) -> float | None:
    """Return the time with the second value of a switch over that with its first, or None if no row has it.

    It is the geometric mean over shapes and forms, with the other switches at their best.
    """
    logs = []
    of_problem: dict[tuple, list[Row]] = {}
    for row in rows:
        of_problem.setdefault((row["batch"], row["patches"], row["dim"], row["form"]), []).append(row)
    for group in of_problem.values():
        first, second = ([row["ms"] for row in group if row[switch] == value] for value in SWITCHES[switch])
        if first and second:
            logs.append(math.log(min(second) / min(first)))
    return math.exp(sum(logs) / len(logs)) if logs else None


def table(rows: list[Row]) -> str:
    """Return the rows in Markdown, the fastest of each problem in bold, and a line on each switch."""
    lines = ["| B × N × D | form | " + " | ".join(SWITCHES) + " | ms |", "| --- " * (len(SWITCHES) + 3) + "|"]
    for row in rows:
        same = [r["ms"] for r in rows if all(r[key] == row[key] for key in ("batch", "patches", "dim", "form"))]
        ms = f"{row['ms']:.2f}"
        shape = f"{row['batch']} × {row['patches']} × {row['dim']}"
        values = " | ".join("-" if row[switch] is None else str(row[switch]) for switch in SWITCHES)
        lines.append(f"| {shape} | {row['form']} | {values} | {f'**{ms}**' if row['ms'] == min(same) else ms} |")
    for switch, (first, second) in SWITCHES.items():
        of_switch = ratio(rows, switch)
        if of_switch is not None:
            default = second if of_switch < 1 else first
            lines.append(f"{switch}: {second} takes {of_switch:.3f} of {first}; the default that follows is {default}")
    return "\n".join(lines)


def step_of(batch: int, n: int, d: int, form: str) -> Callable[[], object]:
    patches, texts = (torch.randn(batch, *x, device="cuda").bfloat16().requires_grad_() for x in ((n, d), (d,)))

    def step() -> object:
        loss = fused_pacl_loss(patches, texts, 20.0, attn_temperature=0.07, form=form, backend="cuda")
        return torch.autograd.grad(loss, (patches, texts))

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7, help="Timed steps of each combination.")
    parser.add_argument("--json", metavar="FILE", help="Write the rows, with a description of the machine.")
    args = parser.parse_args()
    if reason := hopper.why_not(torch.device("cuda"), torch.bfloat16):
        parser.error(f"backend 'cuda' cannot run here: {reason}")
    rows: list[Row] = []
    before = dataclasses.asdict(hopper.settings)
    for (batch, n, d), form in itertools.product(SHAPES, ("dot", "cosine")):
        step = step_of(batch, n, d, form)
        for chosen in combinations(form, hopper.fits_sigmoid(n)):
            vars(hopper.settings).update(chosen)
            ms = milliseconds(step, args.repeats)
            vars(hopper.settings).update(before)
            rows.append(dict(batch=batch, patches=n, dim=d, form=form, **chosen, ms=ms))
            print(rows[-1], flush=True)
            if args.json:  # after each row, because a run may be interrupted
                machine = report.machine(torch.device("cuda"), None)
                Path(args.json).write_text(
                    json.dumps({"machine": machine, "settings": vars(args), "rows": rows}, indent=1)
                )
    print(table(rows))


if __name__ == "__main__":
    main()
