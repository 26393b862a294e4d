"""Constants that are written in several languages are the same in each."""

import math

import pytest
import torch

from pacl_kernels import constants
from pacl_kernels.native import native


def _float32(x: float) -> float:
    return torch.tensor(x, dtype=torch.float32).item()


@pytest.fixture
def in_cpp(cpu_backend) -> dict[str, float]:
    return native().constants()


def test_cpp(in_cpp):
    """The C++ constants equal Python's in float32; a new C++ constant fails here until it is compared."""
    expected = {
        "running_max_below": constants.RUNNING_MAX_BELOW,
        "min_norm_squared": constants.MIN_NORM**2,
        "min_pooled_norm": constants.MIN_POOLED_NORM,
        "largest_score": constants.LARGEST_SCORE,
        "log2e": 1.0 / math.log(2.0),
    }
    assert in_cpp == {name: _float32(value) for name, value in expected.items()}


def test_triton(in_cpp):
    """Triton's own constants equal those of C++; its kernels take the others from `constants.py` as arguments."""
    kernels = pytest.importorskip("pacl_kernels.backends.gpu.kernels", reason="triton is missing")
    assert _float32(kernels.forward.RUNNING_MAX_BELOW.value) == in_cpp["running_max_below"]
    assert _float32(kernels.rows.MIN_NORM_SQUARED.value) == in_cpp["min_norm_squared"]
    assert _float32(kernels.shared.LOG2E.value) == in_cpp["log2e"]
