"""Numbers that stand in several languages are the same in each."""

import pytest
import torch

from pacl_kernels import reference
from pacl_kernels.backends import cuda
from pacl_kernels.native import native


def _float32(x: float) -> float:
    return torch.tensor(x, dtype=torch.float32).item()


@pytest.fixture
def constants(cpu_backend) -> dict[str, float]:
    return native().constants()


def test_of_the_native_module_and_the_reference(constants):
    """In C++ they are float32. A new one there fails here until it is compared."""
    expected = {
        "running_max_below": cuda._PLAIN_TEMPERATURE,
        "min_norm_squared": reference.MIN_NORM**2,
        "min_pooled_norm": reference.MIN_POOLED_NORM,
        "largest_score": reference.LARGEST_SCORE,
    }
    assert constants == {name: _float32(value) for name, value in expected.items()}


def test_of_triton(constants):
    """Triton takes the pooled norm's floor and the largest score from the reference."""
    pytest.importorskip("triton", reason="triton is missing")
    from pacl_kernels.backends.triton_kernels import PLAIN_TEMPERATURE, rows

    assert _float32(PLAIN_TEMPERATURE.value) == constants["running_max_below"]
    assert _float32(rows.MIN_NORM_SQUARED.value) == constants["min_norm_squared"]
