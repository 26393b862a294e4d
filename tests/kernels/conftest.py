"""Fixtures for every backend, device and dtype. `problems.py` makes the inputs, `accuracy.py` judges the answers."""

from __future__ import annotations

import ctypes
import os
from typing import NamedTuple

import emulated
import pytest
import torch
from filelock import FileLock
from interpreter import hasten
from problems import ISAS

from pacl_kernels import available_backends
from pacl_kernels.backends.gpu import hopper
from pacl_kernels.native import native

if os.environ.get("TRITON_INTERPRET") == "1":
    hasten()


@pytest.fixture(autouse=True)
def _memory_of_nan():
    """Fill memory from malloc with bytes of 255, which are NaN in every dtype: what nobody wrote must not matter."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # of glibc
    perturb = -6  # M_PERTURB
    if mallopt is None:
        yield
        return
    mallopt(perturb, 256)
    yield
    mallopt(perturb, 0)


class Target(NamedTuple):
    """Name a backend, with the device and the dtype of a test."""

    backend: str
    device: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.backend}-{self.device}-{str(self.dtype).removeprefix('torch.')}"


_LOW = (torch.float32, torch.bfloat16, torch.float16)
_TARGETS = [
    *(Target("torch", "cpu", dtype) for dtype in (*_LOW, torch.float64)),
    *(Target("cpu", "cpu", dtype) for dtype in _LOW),
    *(Target("torch", "cuda", dtype) for dtype in (*_LOW, torch.float64)),
    *(Target("triton", "cuda", dtype) for dtype in _LOW),
    *(Target("cuda", "cuda", dtype) for dtype in (torch.bfloat16, torch.float16)),
]


def _parameter(target: Target):
    marks = [pytest.mark.gpu] if target.device == "cuda" else []
    if target.device == "cuda" and not torch.cuda.is_available():
        marks.append(pytest.mark.skip(reason="no CUDA device"))
    reason = available_backends()[target.backend]
    if reason is not None:
        marks.append(pytest.mark.skip(reason=f"backend {target.backend!r}: {reason}"))
    return pytest.param(target, id=str(target), marks=marks)


@pytest.fixture(params=[_parameter(target) for target in _TARGETS])
def target(request) -> Target:
    """Return each backend with each device and dtype that it takes."""
    return request.param


@pytest.fixture(params=[_parameter(target) for target in _TARGETS if target.dtype == torch.float32])
def single(request) -> Target:
    """Return each backend and device in float32, for tests that do not depend on the dtype."""
    return request.param


@pytest.fixture
def cpu_backend() -> str:
    """Return the name of the native CPU backend; skip the test where it is not built."""
    reason = available_backends()["cpu"]
    if reason is not None:
        pytest.skip(f"backend 'cpu': {reason}")
    return "cpu"


# The same code with vectors of the same width: a build with sanitizers, which is slow, tests only one of the two.
_SEEN_IN = {"amx": "emulated_amx", "avx512": "avx512bf16"}


@pytest.fixture(params=ISAS)
def isa(request, cpu_backend, monkeypatch) -> str:
    """Set PACL_CPU_ISA to each instruction set of this machine, and return its name."""
    if request.param not in native().isas():
        pytest.skip(f"this machine has no {request.param}")
    if _SEEN_IN.get(request.param, "") in native().isas() and "emulated_amx" in native().isas():
        pytest.skip(f"a build with sanitizers sees its accesses in {_SEEN_IN[request.param]}")
    monkeypatch.setenv("PACL_CPU_ISA", request.param)
    return request.param


@pytest.fixture
def gigabytes(tmp_path_factory):
    """Let one test at a time, over all processes, use much of the GPU's memory, and free it afterwards."""
    with FileLock(tmp_path_factory.getbasetemp().parent / "gigabytes.lock"):
        torch.cuda.empty_cache()
        yield
        torch.cuda.empty_cache()


@pytest.fixture(params=[1, 2], ids="cluster{}".format)
def cluster(request, monkeypatch):
    """Set the number of blocks in a cluster of the Hopper kernels."""
    monkeypatch.setattr(hopper.settings, "cluster", request.param)


@pytest.fixture(scope="session")  # with module scope, a process would rebuild it whenever it returns to this module
def library(tmp_path_factory, worker_id):
    """Return the emulator of the Hopper kernels; the first test process builds it in half a minute, the others wait."""
    folder = tmp_path_factory.getbasetemp()
    if worker_id != "master":
        folder = folder.parent  # shared by all test processes
    with FileLock(folder / "emulated.lock"):
        return emulated.load(folder)
