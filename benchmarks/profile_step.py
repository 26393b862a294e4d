"""Profile a training step on a GPU, kernel by kernel, with torch's profiler.

    python benchmarks/profile_step.py --backend cuda --form cosine --json profile.json
    ncu --section ComputeWorkloadAnalysis --kernel-name regex:score_kernel python benchmarks/profile_step.py --once

The second command shows how busy the tensor cores are, which torch's profiler does not.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import report
import torch

from pacl_kernels import fused_pacl_loss
from pacl_kernels.backends import NAMES
from pacl_kernels.checks import FORMS, LOSSES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4096, help="Number of images, and of texts.")
    parser.add_argument("--patches", type=int, default=196, help="Patches per image.")
    parser.add_argument("--dim", type=int, default=512, help="Dimension of the embeddings.")
    parser.add_argument("--backend", choices=NAMES, default="auto", help="Backend of the fused loss.")
    parser.add_argument("--form", choices=FORMS, default="dot", help="Form of φ.")
    parser.add_argument("--loss", choices=LOSSES, default="infonce", help="Loss over the pairs.")
    parser.add_argument("--once", action="store_true", help="Run one step without profiling, for an outer profiler.")
    parser.add_argument("--json", metavar="FILE", help="Write the rows, with a description of the machine.")
    args = parser.parse_args()
    patches = torch.randn(args.batch, args.patches, args.dim, device="cuda").bfloat16().requires_grad_()
    texts = torch.randn(args.batch, args.dim, device="cuda").bfloat16().requires_grad_()

    def step() -> None:
        options = {"attn_temperature": 0.1, "form": args.form, "loss": args.loss, "backend": args.backend}
        loss = fused_pacl_loss(patches, texts, 20.0, **options)
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
    of_what = f"{args.backend} {args.form} {args.loss} B{args.batch} N{args.patches} D{args.dim} bfloat16"
    print(f"{of_what}: {total:.2f} ms in kernels")
    for row in rows:
        print(f"{row['ms']:9.3f} ms {row['launches']:5} x {row['kernel'][:90]}")
    if args.json:
        machine = report.machine(torch.device("cuda"), None)
        Path(args.json).write_text(json.dumps({"machine": machine, "settings": vars(args), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
