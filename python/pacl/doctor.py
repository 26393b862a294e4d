"""`pacl doctor`: what can run here, what is missing and how to get it, and whether the loss computes what it should."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
from typing import Any

import torch

import pacl_kernels
from pacl_kernels import available_backends, fused_pacl_loss, reference

PACKAGES = ("torch", "triton", "numpy", "open_clip_torch", "timm", "torchvision", "webdataset", "safetensors", "pillow")
TOLERANCE = 1e-4  # of float32, norm of the difference over norm of the truth


def report() -> dict[str, Any]:
    """Plain values only: what `--json` prints. Nothing of the environment but what is named here."""
    return {
        "pacl_kernels": pacl_kernels.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "isa": _cpu_isa()},
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "disk_free_gib": round(shutil.disk_usage(".").free / 2**30, 1),
        "backends": available_backends(),
        "errors": {name: self_check(name) for name in _checkable()},
    }


def self_check(backend: str) -> float:
    """The largest relative error of a backend's loss and gradients (float32) against the reference in float64."""
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    patches, texts = (torch.randn(*shape, generator=generator) for shape in ((5, 49, 96), (5, 96)))
    worst = 0.0
    for form in ("dot", "cosine", "max"):
        options = {"attn_temperature": 0.1, "form": form}
        exact = [x.double().requires_grad_() for x in (patches, texts)]
        truth = reference.pacl_loss(*exact, 10.0, **options)
        inputs = [x.to(device).requires_grad_() for x in (patches, texts)]
        value = fused_pacl_loss(*inputs, 10.0, **options, backend=backend)
        answers = [value, *torch.autograd.grad(value, inputs)]
        for answer, true in zip(answers, [truth, *torch.autograd.grad(truth, exact)], strict=True):
            error = (answer.cpu().double() - true).norm() / true.norm()
            worst = max(worst, error.item() if error.isfinite() else float("inf"))
    return worst


def main(as_json: bool) -> int:
    """Print the report; 1 if a backend computes something else than the reference."""
    found = report()
    wrong = [name for name, error in found["errors"].items() if error > TOLERANCE]
    if as_json:
        print(json.dumps(found, indent=2))
        return 1 if wrong else 0
    print(f"pacl_kernels {found['pacl_kernels']}, Python {found['python']}, {found['platform']}")
    for name, version in found["packages"].items():
        print(f"  {name:<16} {version or 'not installed'}")
    if None in [version for name, version in found["packages"].items() if name != "triton"]:
        print("  what is not installed comes with: pip install 'pacl-kernels[train]'")
    cpu = found["cpu"]
    print(f"{cpu['cores']} cores, {cpu['threads']} threads, {cpu['isa'] or 'no native module'}")
    print(f"GPUs: {', '.join(found['gpus']) or 'none'}; {found['disk_free_gib']} GiB free on this disk")
    print("Backends, and their largest error against float64:")
    for name, reason in found["backends"].items():
        error = found["errors"].get(name)
        state = "available" if reason is None else reason
        if error is not None:
            state = f"{error:.1e}" + ("" if name not in wrong else f", WRONG (expected at most {TOLERANCE:.0e})")
        print(f"  {name:<10} {state}")
    return 1 if wrong else 0


def _checkable() -> list[str]:
    """Backends that run here at a usual speed, Triton's interpreter not among them."""
    found = [name for name, reason in available_backends().items() if reason is None and name != "reference"]
    return [name for name in found if name != "triton" or torch.cuda.is_available()]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_isa() -> str | None:
    try:
        from pacl_kernels import _native
    except ImportError:
        return None
    return _native.cpu_isa()
