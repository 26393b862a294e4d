"""Fixtures: every backend on every device and dtype it takes. `problems.py` makes inputs, `accuracy.py` judges."""

from __future__ import annotations

import os
from typing import NamedTuple

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # one thread for each of the processes that share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

from pacl_kernels import available_backends


class Target(NamedTuple):
    """Where and in what dtype a backend is tried."""

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
    """Each backend, device and dtype."""
    return request.param


@pytest.fixture(params=[_parameter(target) for target in _TARGETS if target.dtype == torch.float32])
def single(request) -> Target:
    """Each backend and device, in float32: for what does not depend on the dtype."""
    return request.param


@pytest.fixture
def cpu_backend() -> str:
    """The name of the native CPU backend; skips where it is not built."""
    reason = available_backends()["cpu"]
    if reason is not None:
        pytest.skip(f"backend 'cpu': {reason}")
    return "cpu"


@pytest.fixture(autouse=True)
def _unchanged_settings(monkeypatch):
    """Neither the caller's environment nor another test's thread count decides what is tested."""
    monkeypatch.delenv("PACL_BACKEND", raising=False)
    monkeypatch.delenv("PACL_CPU_ISA", raising=False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
