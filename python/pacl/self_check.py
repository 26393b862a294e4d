"""Report what runs here and what is missing, and check every backend against the reference."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import shutil
from collections.abc import Iterator
from typing import Any

import torch

import pacl_kernels
from pacl_kernels import available_backends, backends, fused_pacl_loss, reference
from pacl_kernels.checks import FORMS
from pacl_kernels.native import native

PACKAGES = ("torch", "triton", "numpy", "open_clip_torch", "timm", "torchvision", "webdataset", "safetensors", "pillow")
# Largest relative error: norm of the difference over norm of the truth. Dtypes are tried in this order.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def report() -> dict[str, Any]:
    """Describe this machine by plain values, which `pacl doctor` prints. Reads nothing else of the environment."""
    return {
        "pacl_kernels": pacl_kernels.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "isa": _cpu_isa()},
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "disk_free_gib": round(shutil.disk_usage(".").free / 2**30, 1),
        "backends": available_backends(),
        "checks": {name: self_check(name) for name in _checkable()},
    }


def self_check(backend: str) -> dict[str, Any]:
    """Compare a backend's loss and gradients with the float64 reference, on a device and in a dtype that it accepts.

    `error` is the largest relative error, None if it is not finite. `failure` is a sentence, None if the check passes.
    """
    target = _target(backend)
    if target is None:
        return _result(failure="it takes none of the devices and dtypes tried here")
    device, dtype = target
    found = _result(device=device, dtype=str(dtype).removeprefix("torch."), tolerance=TOLERANCES[dtype])
    try:
        error = max(_errors(backend, device, dtype))
    except Exception as reason:  # the report exists to show whatever a backend raises
        found["failure"] = f"{type(reason).__name__}: {next(iter(str(reason).strip().splitlines()), 'no message')}"
        return found
    if not math.isfinite(error):
        found["failure"] = "an answer is not finite"
        return found
    found["error"] = error
    if error > TOLERANCES[dtype]:
        found["failure"] = f"its error is {error:.1e}, expected at most {TOLERANCES[dtype]:.0e}"
    return found


def _result(**known: Any) -> dict[str, Any]:
    return {"device": None, "dtype": None, "error": None, "tolerance": None, "failure": None} | known


def _target(backend: str) -> tuple[str, torch.dtype] | None:
    """Return the first device (GPU before CPU) and dtype that the backend accepts, or None."""
    devices = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    why_not = backends.get(backend).why_not
    targets = ((device, dtype) for device in devices for dtype in TOLERANCES)
    return next((target for target in targets if why_not(torch.device(target[0]), target[1]) is None), None)


def _errors(backend: str, device: str, dtype: torch.dtype) -> Iterator[float]:
    """Yield the relative error of each loss and gradient (by norms); infinity if it is not finite."""
    generator = torch.Generator().manual_seed(0)
    patches, texts = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((5, 49, 96), (5, 96)))
    for form in FORMS:
        options: dict[str, Any] = {"attn_temperature": 0.1, "form": form}
        exact = [x.double().requires_grad_() for x in (patches, texts)]
        truth = reference.pacl_loss(exact[0], exact[1], 10.0, **options)
        inputs = [x.to(device).requires_grad_() for x in (patches, texts)]
        options |= {"backend": backend}
        value = fused_pacl_loss(inputs[0], inputs[1], 10.0, **options)
        answers = [value, *torch.autograd.grad(value, inputs)]
        for answer, true in zip(answers, [truth, *torch.autograd.grad(truth, exact)], strict=True):
            error = ((answer.detach().cpu().double() - true).norm() / true.norm()).item()
            yield error if math.isfinite(error) else math.inf


def _checkable() -> list[str]:
    """Return the backends that run here at full speed, which excludes Triton's interpreter."""
    found = [name for name, reason in available_backends().items() if reason is None and name != "reference"]
    return [name for name in found if name != "triton" or torch.cuda.is_available()]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_isa() -> str | None:
    module = native()
    return None if module is None else module.cpu_isa()
