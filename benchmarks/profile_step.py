"""Where a training step's time on a GPU goes, kernel by kernel, as torch's profiler has it.

    python benchmarks/profile_step.py --backend cuda --form cosine --json profile.json
    ncu --section ComputeWorkloadAnalysis --kernel-name regex:score_kernel python benchmarks/profile_step.py --once

The second: how busy the tensor cores are, which torch's profiler does not say.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import report
import torch

from pacl_kernels import fused_pacl_loss
from pacl_kernels.backends import NAMES
from pacl_kernels.checks import FORMS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("batch", 4096), ("patches", 196), ("dim", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--backend", choices=NAMES, default="auto")
    parser.add_argument("--form", choices=FORMS, default="dot")
    parser.add_argument("--once", action="store_true", help="one step and no profile, for a profiler around it")
    parser.add_argument("--json", metavar="FILE", help="write the rows, with the machine they are from")
    args = parser.parse_args()
    patches = torch.randn(args.batch, args.patches, args.dim, device="cuda").bfloat16().requires_grad_()
    texts = torch.randn(args.batch, args.dim, device="cuda").bfloat16().requires_grad_()

    def step() -> None:
        loss = fused_pacl_loss(patches, texts, 20.0, attn_temperature=0.1, form=args.form, backend=args.backend)
        torch.autograd.grad(loss, (patches, texts))

    step()  # compiles
    if args.once:
        return
    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        step()
        torch.cuda.synchronize()
    events = sorted(trace.key_averages(), key=lambda event: -event.device_time_total)
    rows = [dict(kernel=e.key, launches=e.count, ms=1e-3 * e.device_time_total) for e in events]
    total = sum(row["ms"] for row in rows)
    print(f"{args.backend} {args.form} B{args.batch} N{args.patches} D{args.dim} bfloat16: {total:.2f} ms in kernels")
    for row in rows:
        print(f"{row['ms']:9.3f} ms {row['launches']:5} x {row['kernel'][:90]}")
    if args.json:
        machine = report.machine(torch.device("cuda"), None)
        Path(args.json).write_text(json.dumps({"machine": machine, "settings": vars(args), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
