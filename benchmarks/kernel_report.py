"""Report registers, spills, shared memory and tensor cores of every Triton kernel that the library launches.

The numbers are read from the machine code, which needs no GPU.

    python benchmarks/kernel_report.py                    # the shipped configurations at common shapes, under 3 minutes
    python benchmarks/kernel_report.py --all --json report.json

The launches are recorded from the library's own code on tensors without data, so that no second list can disagree.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from pacl_kernels.backends import computes_sigmoid_step
from pacl_kernels.backends.gpu import kernels, tiles
from pacl_kernels.backends.gpu import triton as backend

TARGETS = (80, 90, 100)
# Shared memory per program, and registers per multiprocessor (NVIDIA's programming guide, compute capabilities).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
REGISTERS = 65536
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"


class Variant(NamedTuple):
    """One call whose launches are reported. The temperature is a Python number unless `tensor_tau`."""

    form: str = "dot"
    dtype: str = "bf16"
    patches: int = 196
    dim: int = 512
    mask: bool = False
    tau: float = 0.07
    tensor_tau: bool = False
    aligned: bool = True
    flat: bool = True  # False: with gaps between images, such as those of a class token
    packed: bool = False  # images of `patches` and of one patch less
    lists: int = 0  # texts in the list of each image, 0 for all pairs
    entropy: bool = False  # for `form="upsample"`, the arg-max of class scores: add best score and entropy

    def __str__(self) -> str:
        if self.form == "upsample":
            return "upsample" + "-entropy" * self.entropy
        marks = [f"N{self.patches}", f"D{self.dim}"]
        marks += ["mask"] * self.mask + [f"tau{self.tau}"] * (self.tau != 0.07) + ["tensor-tau"] * self.tensor_tau
        marks += ["packed"] * self.packed + ["unaligned"] * (not self.aligned) + ["gaps"] * (not self.flat)
        marks += [f"lists{self.lists}"] * (self.lists > 0)
        return "-".join([self.form, *marks])


DEFAULT = [
    *(Variant(dim=dim, mask=mask) for dim in (512, 768) for mask in (False, True)),
    Variant(form="cosine"),
    Variant(form="max"),
    Variant(dtype="fp32"),
    Variant(form="upsample", dtype="fp32"),
    Variant(form="upsample", entropy=True),
]
# Variants similar to those above; one architecture is enough.
ON_90 = [
    Variant(dtype="fp16"),
    Variant(flat=False),
    Variant(patches=48),
    Variant(tau=0.01),
    Variant(tensor_tau=True),
    Variant(form="cosine", dtype="fp32", patches=49),
    *(Variant(form=form, packed=True) for form in ("dot", "cosine", "max")),
    Variant(lists=64),
]
# Kernels without a tile of scores, one row each, for the same architecture.
ONCE = (
    "inverse_norms_kernel",
    "project_out_kernel",
    "gram_kernel",
    "shifted_logsumexp_kernel",
    "sigmoid_loss_kernel",
    "loss_backward_kernel",
    "listed_forward_kernel",
    "listed_weights_kernel",
    "sum_rows_kernel",
)


class Launch(NamedTuple):
    """Input of Triton's compiler, by its own rules: types, constants and alignments by argument name."""

    kernel: str
    config: str
    dtype: str
    target: int
    signature: dict
    constants: dict
    aligned: tuple
    warps: int
    stages: int
    registers: int
    fma: bool


def launches(variant: Variant, target: int, batch: int = 1024) -> list[Launch]:
    """Return the launches of a call's forward and backward, on tensors without data."""
    seen: list[Launch] = []
    compiler = make_backend(GPUTarget("cuda", target, 32))

    def record(kernel, programs, arguments, constants, warps=4, stages=3, registers=0, fma=True) -> None:
        bind = create_function_from_signature(kernel.signature, kernel.params, compiler)
        kinds = dict(zip(kernel.arg_names, bind(*arguments, **constants)[1], strict=True))
        signature = {name: kind for name, (kind, _) in kinds.items()}
        fixed = {name: value for name, (kind, value) in kinds.items() if kind == "constexpr"}
        aligned = tuple(name for name, (kind, value) in kinds.items() if kind != "constexpr" and value == "D")
        names = kernel.fn.__name__, str(variant), variant.dtype
        seen.append(Launch(*names, target, signature, fixed, aligned, warps, stages, registers, fma))

    dtype, dim = DTYPES[variant.dtype], variant.dim
    padding = 0 if variant.aligned else 1
    gap = 0 if variant.flat else 1
    patches = torch.empty(batch, gap + variant.patches, padding + dim, dtype=dtype, device="meta")[:, gap:, padding:]
    texts = torch.empty(batch, padding + dim, dtype=dtype, device="meta")[:, padding:]
    packed = {}
    if variant.packed:
        lengths = variant.patches - torch.arange(batch) % 2
        patches, packed = patches.flatten(0, 1)[: int(lengths.sum())], {"patch_lengths": lengths}
    mask = torch.empty(patches.shape[:-1], dtype=torch.bool, device="meta") if variant.mask else None
    tau = torch.empty((), device="meta") if variant.tensor_tau else variant.tau
    phi, state, grad_phi = (torch.empty(batch, variant.lists or batch, device="meta") for _ in range(3))
    index = torch.empty(batch, variant.lists, dtype=torch.int64, device="meta") if variant.lists else None
    grads = torch.empty_like(patches), torch.empty_like(texts), phi.new_empty(()) if variant.tensor_tau else None
    grads = grads[0].contiguous(), grads[1].contiguous(), grads[2]
    replaced = dict(run=record, processors=lambda device: 132)
    chip = dict(architecture=lambda device: target, has_bulk_copies=lambda device: target >= 90)
    with mock.patch.multiple("pacl_kernels.backends.gpu.launch", **replaced), mock.patch.multiple(tiles, **chip):
        if variant.form == "upsample":
            _upsample(dtype, variant.entropy)
            return seen
        inputs = patches, texts, mask, tau, variant.form, phi, state
        backend.compatibility_forward(*inputs, text_index=index, **packed)
        backend.compatibility_backward(*inputs, grad_phi, *grads, text_index=index, **packed)
        if variant.lists:
            return seen
        value, scale, statistics = phi.new_empty(()), phi.new_empty(()), phi.new_empty(4, len(phi))
        for loss, kept in (("infonce", statistics), ("sigmoid", None)):
            backend.loss_forward(phi, scale, None, loss, value, kept)
            backend.loss_backward(phi, scale, None, loss, kept, value, grad_phi, value, value)
        if not variant.packed and computes_sigmoid_step("triton", variant.form, dtype, variant.patches):
            scalars = scale, scale, None, value
            backend.sigmoid_step(patches, texts, mask, tau, variant.form, *scalars, *grads, value, value, None)
    return seen


def _upsample(dtype: torch.dtype, entropy: bool) -> None:
    scores, labels = torch.empty(2, 150, 32, 43, dtype=dtype, device="meta"), torch.empty(2, 512, 683, device="meta")
    rows, columns = (
        (torch.empty(size, dtype=torch.int32, device="meta"), torch.empty(size, device="meta"))
        for size in labels.shape[1:]
    )
    best = labels if entropy else None
    backend.upsample_argmax(scores, rows, columns, 10.0, labels.short(), best, best)


def compiled(launch: Launch):
    """Compile the kernel of a launch; `asm` of the result holds its code as text and as machine code."""
    kernel = getattr(kernels, launch.kernel)
    index = {name: i for i, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        kernel,
        {name: launch.signature[name] for name in kernel.arg_names},
        {(index[name],): value for name, value in launch.constants.items()},
        {(index[name],): [["tt.divisibility", 16]] for name in launch.aligned},
    )
    options = dict(num_warps=launch.warps, num_stages=launch.stages, maxnreg=launch.registers or None)
    options["enable_fp_fusion"] = launch.fma
    return triton.compile(source, target=GPUTarget("cuda", launch.target, 32), options=options)


def compile_launch(launch: Launch) -> dict:
    """Compile a launch and return its row, read from the machine code."""
    kernel = compiled(launch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        code = _run("nvdisasm", "-c", file.name)
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    sides = ("BLOCK_T", "BLOCK_P", "BLOCK_N", "BLOCK_D", "BLOCK_M", "BLOCK", "BLOCK_K", "C0", "C1", "C2")
    tile = {key: launch.constants[key] for key in sides if key in launch.constants}
    return {
        "kernel": launch.kernel.removesuffix("_kernel"),
        "config": f"{launch.config} {'x'.join(map(str, tile.values()))} warps {launch.warps} stages {launch.stages}",
        "dtype": launch.dtype,
        "target": f"sm_{launch.target}",
        "registers": registers,
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "shared_bytes": kernel.metadata.shared,
        "tensor_core": _tensor_core(code),
        "programs_per_sm": min(
            REGISTERS // (registers * 32 * launch.warps),
            SHARED_LIMIT[launch.target] // max(1, kernel.metadata.shared),
        ),
    }


def _run(tool: str, *arguments: str) -> str:
    # In some versions of the wheel the nvdisasm for the newest chips has another name.
    found = next((path for path in (TOOLS / tool, TOOLS / f"{tool}-blackwell") if path.exists()), tool)
    return subprocess.run([found, *arguments], capture_output=True, text=True, check=True).stdout


def _tensor_core(code: str) -> str:
    """Return the instruction family of the products: wgmma (Hopper), tcgen05 (Blackwell), mma (Ampere), or none."""
    for instruction, name in (("GMMA", "wgmma"), (r"UTC\w*MMA", "tcgen05"), (r"[HI]MMA", "mma")):
        if re.search(rf"\b\w?{instruction}", code):
            return name
    return "none"


def rows_of(variants: list[Variant], targets) -> list[Launch]:
    """Return every distinct launch: those with the same types, constants and alignments share a binary."""
    unique: dict[tuple, Launch] = {}
    for target in targets:
        for variant in [*variants, *(ON_90 if target == 90 else ())]:
            for launch in launches(variant, target):
                if launch.kernel not in ONCE:
                    unique.setdefault((launch.kernel, target, *(str(part) for part in launch[4:])), launch)
                elif target == 90 or 90 not in targets:
                    unique.setdefault((launch.kernel,), launch)
    return list(unique.values())


def every_variant() -> list[Variant]:
    found = [
        Variant(form, dtype, patches, dim, mask, tau, tensor_tau, aligned)
        for form, dtype, patches, dim, mask, tau, tensor_tau, aligned in itertools.product(
            ("dot", "cosine", "max"), DTYPES, (49, 100, 196, 256), (512, 520), (False, True), (0.07, 0.01),
            (False, True), (True, False),
        )
    ]  # fmt: skip
    return found


def report(variants: list[Variant], targets, jobs: int) -> list[dict]:
    with ProcessPoolExecutor(jobs) as pool:
        return list(pool.map(compile_launch, rows_of(variants, targets)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="Compile every variant, not only the common ones (hours).")
    every = ",".join(map(str, TARGETS))
    parser.add_argument("--targets", default=every, help="Compute capabilities times ten, separated by commas.")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="Number of compiling processes.")
    parser.add_argument("--json", metavar="FILE", help="Write the rows.")
    args = parser.parse_args()
    targets = [int(target) for target in args.targets.split(",")]
    rows = report(every_variant() if args.all else DEFAULT, targets, args.jobs)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    widths = {key: max(len(key), *(len(str(row[key])) for row in rows)) for key in rows[0]}
    print("  ".join(key.ljust(width) for key, width in widths.items()))
    for row in rows:
        print("  ".join(str(row[key]).ljust(width) for key, width in widths.items()))
    print(f"{len(rows)} kernels, triton {triton.__version__}", file=sys.stderr)


if __name__ == "__main__":
    main()
