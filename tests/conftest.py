"""The environment of all tests; `helpers` has what several of them import."""

from __future__ import annotations

import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # one thread for each of the processes that share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported


@pytest.fixture(autouse=True)
def _unchanged_settings(monkeypatch):
    """Neither the caller's environment nor another test's thread count decides what is tested."""
    monkeypatch.delenv("PACL_BACKEND", raising=False)
    monkeypatch.delenv("PACL_CPU_ISA", raising=False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
