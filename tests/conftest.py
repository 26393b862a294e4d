"""The environment of all tests; `helpers` has the modules that several tests import."""

from __future__ import annotations

import os
import zlib

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # processes that share the cores get one thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # must be set before triton is imported

SLOW = ("recipes_full", "families", "long")  # markers of tests that run only when `-m` names them


def pytest_addoption(parser):
    parser.addoption(
        "--sample",
        type=int,
        default=1,
        metavar="N",
        help="Run one in N of the cases of each test, chosen by their names, and at least one.",
    )


@pytest.hookimpl(tryfirst=True)  # before `-m` selects by the marks that are added here
def pytest_collection_modifyitems(config, items):
    share = config.getoption("--sample")
    for cases in _cases_of_tests(items):
        sampled = cases[0].get_closest_marker("sampled")
        chosen = cases[:: sampled.args[0]] if sampled else cases
        for item in set(cases) - set(chosen):
            item.add_marker("long")
        for item in set(chosen) - set(chosen[::share]):
            item.add_marker("not_in_sample")
    if share > 1:
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("not_in_sample")])
        items[:] = [item for item in items if not item.get_closest_marker("not_in_sample")]
    for item in items:
        for name in SLOW:
            if name not in config.getoption("-m") and item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=f"slow: run with -m {name}"))


def _cases_of_tests(items):
    """Return lists of the cases of each test, in an order that depends on their names alone."""
    cases: dict[str, list] = {}
    for item in sorted(items, key=lambda item: zlib.crc32(item.nodeid.encode())):
        cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    return cases.values()


@pytest.fixture(autouse=True)
def _unchanged_settings(monkeypatch):
    """Shield each test from the caller's environment and from other tests' thread counts."""
    monkeypatch.delenv("PACL_BACKEND", raising=False)
    monkeypatch.delenv("PACL_CPU_ISA", raising=False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
