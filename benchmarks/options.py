"""Command line of `throughput.py`."""

from __future__ import annotations

import argparse
import math

import torch
from counts import unit

from pacl_kernels import backends
from pacl_kernels.checks import FORMS, LOSSES
from pacl_kernels.native import native

ERROR_UNIT = 2e10  # if a unit is larger, errors are measured at a smaller batch, because the float64 truth is slow
# Environment that confines this library, PyTorch's own kernels, oneDNN and MKL to AVX2; they read it when they start.
AVX2 = {
    "PACL_CPU_ISA": "avx2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the loss and its peers (`throughput.py`).")
    add = parser.add_argument
    add("--batch", type=int, default=256, help="Number of images, and of texts.")
    add("--patches", type=int, default=196, help="Patches per image.")
    add("--dim", type=int, default=512, help="Dimension of the embeddings.")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="Dtype of the embeddings.")
    add("--form", choices=FORMS, default="dot", help="Form of φ.")
    add("--loss", choices=LOSSES, default="infonce", help="Loss over φ.")
    add("--temperature", type=float, default=0.1, help="Temperature of the softmax over patches.")
    add("--frozen-texts", action="store_true", help="Compute no gradient of the texts.")
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=("cpu", "cuda"), default=default_device, help="Device to run on.")
    add("--threads", type=int, default=torch.get_num_threads(), help="Threads on the CPU.")
    add("--backend", help="Backends of the fused loss, separated by commas (default: all for this device).")
    add(
        "--peers",
        default="all",
        help="Only peers with one of these words in their names, parted by ';'; 'none' for none.",
    )
    add("--max-autotune", action="store_true", help="Run torch.compile's max-autotune too, which takes minutes.")
    add("--avx2", action="store_true", help="Confine the kernels and all peers to AVX2, on a CPU that has more.")
    add("--repeats", type=int, default=11, help="Timed runs of each provider; slow ones get fewer, but at least 3.")
    add("--seed", type=int, default=0, help="Seed of the inputs.")
    add("--json", metavar="FILE", help="Write the result, with a description of the machine.")
    add("--plot", metavar="FILE", help="Write a chart, .svg or .png.")
    add("--profile", metavar="FILE", help="Write a trace of one step of each provider, for Perfetto.")
    add("--sweep", metavar="FILE", help="Measure many shapes, forms and dtypes; FILE keeps them, and is continued.")
    add(
        "--minutes",
        type=float,
        default=math.inf,
        help="Time for --sweep; points that take longer wait for a later call.",
    )
    add("--quick", action="store_true", help="Use small shapes and 3 repeats, to see that it runs.")
    if parser.parse_args(argv).quick:
        parser.set_defaults(batch=16, patches=49, dim=64, repeats=3)
    args = parser.parse_args(argv)
    for name in ("batch", "patches", "dim", "threads", "repeats"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: got {getattr(args, name)}, expected at least 1")
    if not 0 < args.temperature < math.inf:
        parser.error(f"--temperature: got {args.temperature}, expected a finite number above 0")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: got cuda, expected cpu, because torch finds no GPU here")
    every = "cpu,torch" if args.device == "cpu" else "cuda,triton,torch"
    args.backend = (args.backend or every).split(",")
    for name in args.backend:
        if name not in backends.NAMES:
            parser.error(f"--backend: got {name!r}, expected some of {', '.join(backends.NAMES)}")
    if args.avx2 and (args.device == "cuda" or (native() is not None and "avx2" not in native().isas())):
        parser.error("--avx2: got it without a CPU that has AVX2, expected --device cpu on such a machine")
    if not args.minutes > 0:
        parser.error(f"--minutes: got {args.minutes}, expected more than 0")
    if args.sweep and args.json:
        parser.error("--json: got it with --sweep, expected one of them, because a sweep has a file of its own")
    args.torch_device, args.torch_dtype = torch.device(args.device), getattr(torch, args.dtype)
    set_error_batch(args)
    return args


def set_error_batch(args) -> None:
    args.error_batch = min(args.batch, max(2, int(args.batch * math.sqrt(ERROR_UNIT / unit(args)))))
