"""Time the two fused functions at small shapes, to compare commits on one machine.

pytest benchmarks/test_regression.py --benchmark-autosave
pytest benchmarks/test_regression.py --benchmark-compare --benchmark-compare-fail=median:10%
"""

import pytest
import torch

from pacl_kernels import fused_pacl_loss
from pacl_kernels.backends import resolve
from pacl_kernels.checks import FORMS

pytest.importorskip("pytest_benchmark")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(64, 196, 256), (16, 577, 512), (128, 50, 130)]  # B, N, D: common, more patches than dimensions, ragged


def make_loss(backend, dtype, form, shape, frozen_texts=False):
    try:
        resolve(backend, DEVICE, dtype)
    except ValueError as error:
        pytest.skip(str(error))
    (b, n, d), generator = shape, torch.Generator().manual_seed(0)
    patches = torch.randn(b, n, d, generator=generator).to(DEVICE, dtype).requires_grad_()
    texts = torch.randn(b, d, generator=generator).to(DEVICE, dtype).requires_grad_(not frozen_texts)
    inputs = [patches] if frozen_texts else [patches, texts]
    return inputs, lambda: fused_pacl_loss(patches, texts, 14.0, attn_temperature=0.1, form=form, backend=backend)


def run(benchmark, function):
    def finished():
        result = function()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return result

    return benchmark.pedantic(finished, rounds=7, warmup_rounds=2)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ("cpu", "cuda", "triton", "torch"))
def test_forward(benchmark, backend, dtype, form, shape):
    _, loss = make_loss(backend, dtype, form, shape)
    with torch.no_grad():
        assert run(benchmark, loss).isfinite()


@pytest.mark.parametrize("frozen_texts", (False, True), ids=("all_gradients", "frozen_texts"))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ("cpu", "cuda", "triton", "torch"))
def test_step(benchmark, backend, dtype, form, shape, frozen_texts):
    inputs, loss = make_loss(backend, dtype, form, shape, frozen_texts)
    for gradient in run(benchmark, lambda: torch.autograd.grad(loss(), inputs)):
        assert gradient.isfinite().all()
