"""The environment of all tests; `helpers` has the modules that several tests import."""

from __future__ import annotations

import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # processes that share the cores get one thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # must be set before triton is imported

SLOW = ("recipes_full", "families", "long")  # markers of tests that run only when `-m` names them


def pytest_collection_modifyitems(config, items):
    for item in items:
        for name in SLOW:
            if name not in config.getoption("-m") and item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=f"slow: run with -m {name}"))


@pytest.fixture(autouse=True)
def _unchanged_settings(monkeypatch):
    """Shield each test from the caller's environment and from other tests' thread counts."""
    monkeypatch.delenv("PACL_BACKEND", raising=False)
    monkeypatch.delenv("PACL_CPU_ISA", raising=False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
