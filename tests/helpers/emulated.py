"""Build the emulator of tests/kernels/cuda as a module, the CUDA part of `pacl_kernels._native`, and run it.

Problems for its launches come with the float64 truth of φ.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]
SOURCES = ("tests/kernels/cuda/emulator.cpp", "tests/kernels/cuda/emulated.cpp")
FLAGS = ("-std=c++20", "-O2", "-shared", "-fPIC", "-fvisibility=hidden", "-DPACL_CUDA")  # as in a build with nvcc
# Enable float16 and FMA contraction where the processor has them, so that tests see the rounding of nvcc's code.
FLAGS += ("-march=native", "-ffp-contract=fast")


def load(folder: Path) -> ModuleType:
    """Load the module from `folder`; build it there first if it is missing."""
    path = folder / "emulated.so"
    if not path.exists():
        _build(path)
    spec = importlib.util.spec_from_file_location("emulated", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _build(path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    # torch brings the headers of pybind11.
    folders = (
        ROOT / "csrc",
        ROOT / "tests/kernels/cuda",
        Path(torch.__file__).parent / "include",
        sysconfig.get_path("include"),
    )
    half = path.with_suffix(".half")  # an interrupted build must not leave a file with the final name
    command = [compiler, *FLAGS, *(f"-I{folder}" for folder in folders), *(str(ROOT / source) for source in SOURCES)]
    subprocess.run([*command, "-o", str(half)], check=True)
    half.rename(path)


def run(
    library,
    patches,
    texts,
    phi,
    state,
    *,
    tau=1.0,
    mask=None,
    epilogue=None,
    weights=None,
    loss=None,
    cluster=0,
    **more,
):
    """Launch as `gpu/hopper.py` does; `more` has tensors of other fields, and settings of the emulator.

    `weights` and `loss` are fields of the launch, with addresses in place of tensors. The sigmoid loss has no state.
    """
    on_device = isinstance(tau, torch.Tensor)
    norms = patches.float().norm(dim=-1)
    if mask is not None:
        norms = norms.masked_fill(~mask, 1.0)
    inverse_p, inverse_t = (1 / norms).contiguous(), 1 / texts.float().norm(dim=-1)
    if epilogue is None:
        forward = "dot_forward_running_max" if not on_device and tau < 0.05 else "dot_forward"
        epilogue = "dot_weights" if weights else forward
    fields = {}
    for name in ("gram", "attention"):
        if name in more:
            x = more.pop(name)
            fields |= {name: x.data_ptr(), f"{name}_stride": x.stride(1)}
    if "norm_factor" in more:
        fields["norm_factor"] = more.pop("norm_factor").data_ptr()
    if weights is not None:
        fields |= dict(weights, full=mask is not None or weights["temperature_sums"] != 0)
    fields |= loss or {}
    library.configure(**more)
    launch = library.CudaLaunch(
        epilogue=getattr(library.CudaEpilogue, epilogue),
        images=len(patches),
        patches=patches.shape[1],
        texts=len(texts),
        dim=patches.shape[2],
        dtype=str(patches.dtype).removeprefix("torch."),
        cluster=cluster,
        device=0,
        patch_rows=patches.data_ptr(),
        patch_stride_image=patches.stride(0),
        patch_stride_row=patches.stride(1),
        text_rows=texts.data_ptr(),
        text_stride=texts.stride(0),
        inverse_texts=inverse_t.data_ptr(),
        temperature=0.0 if on_device else tau,
        temperature_at=tau.data_ptr() if on_device else 0,
        phi=0 if phi is None else phi.data_ptr(),
        state=0 if state is None else state.data_ptr(),
        phi_stride=len(texts),
        **fields,
    )
    if epilogue != "cosine_forward_from_attention":
        columns = torch.empty(launch.plan.groups * launch.plan.chunks * launch.plan.width)
        launch.make_columns(
            inverse_norms=inverse_p.data_ptr(),
            mask=0 if mask is None else mask.data_ptr(),
            mask_strides=(0, 0) if mask is None else mask.stride(),
            columns=columns.data_ptr(),
        )
    launch.run()


def problem(b, n, k, d, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pitch = -(-d // 8) * 8  # the copy engine needs this alignment; the padding (NaN) must not matter
    patches = torch.full((b, n, pitch), float("nan")).to(dtype)
    texts = torch.full((k, pitch), float("nan")).to(dtype)
    patches[..., :d] = torch.randn(b, n, d, generator=generator) * 0.3 + torch.randn(b, 1, d, generator=generator)
    texts[:, :d] = torch.randn(k, d, generator=generator)
    return patches[..., :d], texts[:, :d]


def truth(patches, texts, tau, mask=None):
    p, t = (torch.nn.functional.normalize(x.double(), dim=-1) for x in (patches, texts))
    s = torch.einsum("bnd,kd->bkn", p, t)
    if mask is not None:
        s = s.masked_fill(~mask[:, None], float("-inf"))
    a = (s / tau).softmax(-1).nan_to_num(0.0)
    s = s.masked_fill(s == float("-inf"), 0.0)
    phi = (a * s).sum(-1)
    entropy = (torch.where(a > 0, -(a * a.clamp_min(1e-300).log2()), 0.0)).sum(-1)
    return s, a, phi, entropy
