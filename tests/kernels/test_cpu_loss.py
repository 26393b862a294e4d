"""Tests of the losses over logits in the native CPU backend, called as operators on φ itself."""

import pytest
import torch
from accuracy import assert_accurate

from pacl_kernels import reference

LOSSES = ("infonce", "sigmoid")
# The other instruction sets take the kernels of float32 from these.
ISAS = pytest.mark.parametrize("isa", ("baseline", "avx2", "avx512"), indirect=True)
# Parts of a vector, several blocks of rows, more columns than a task merges, and than are summed in float32.
SIZES = (1, 7, 65, 257, 600)


def phi_of(size: int, data: str) -> torch.Tensor:
    """Return φ `[B, B]`: cosines of which the pairs' are the largest ("aligned") or any ("random"), or all equal."""
    generator = torch.Generator().manual_seed(size)
    if data == "equal":
        return torch.full((size, size), 0.25)
    phi = torch.rand(size, size, generator=generator) - 0.5
    return phi + 0.5 * torch.eye(size) if data == "aligned" else phi


def run(phi, scale, bias, loss, upstream=1.0, needs=(True, True), backend="cpu"):
    """Return the loss, the statistics (None for the sigmoid loss) and the gradients of φ, scale and bias."""
    value, grad_phi = phi.new_full((), torch.nan), torch.full_like(phi, torch.nan)
    statistics = phi.new_full((4, len(phi)), torch.nan) if loss == "infonce" else None
    grads = [phi.new_full((), torch.nan) if needed else None for needed in needs]
    arguments = (phi, None, scale, None, bias, loss, backend)
    torch.ops.pacl_kernels.loss_forward(*arguments, value, statistics)
    torch.ops.pacl_kernels.loss_backward(*arguments, statistics, phi.new_tensor(upstream), grad_phi, *grads)
    return value, statistics, grad_phi, *grads


def formula(phi, scale, bias, loss, upstream, dtype):
    """Return the loss of the reference in `dtype`, and its gradients of φ, scale and bias."""
    leaves = [torch.as_tensor(x).to(dtype).requires_grad_() for x in (phi, scale, bias)]
    value = reference.contrastive_loss(leaves[0] * leaves[1] + leaves[2], loss)
    return value.detach(), *torch.autograd.grad(value, leaves, torch.tensor(upstream, dtype=dtype))


@ISAS
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("data, scale", [("random", 10.0), ("random", 100.0), ("aligned", 100.0), ("equal", 100.0)])
def test_accuracy(data, scale, loss, isa):
    bias, upstream = -3.0, 0.7
    for size in SIZES:
        phi = phi_of(size, data)
        value, _, *grads = run(phi, scale, bias, loss, upstream)
        truth, plain = (formula(phi, scale, bias, loss, upstream, dtype) for dtype in (torch.float64, torch.float32))
        sizes = 1.0, upstream * scale / size**0.5, upstream, upstream  # as in `accuracy.natural_sizes`
        names = (f"{name} at B = {size}" for name in ("value", "phi", "scale", "bias"))
        for name, answer, true, by_formula, natural in zip(names, (value, *grads), truth, plain, sizes, strict=True):
            assert_accurate(name, answer, true, torch.float32, by_formula, natural)


@ISAS
@pytest.mark.parametrize("loss", LOSSES)
def test_same_bits(loss, isa):
    """Neither the number of threads nor the gradients that are asked for change a bit."""
    phi, answers = phi_of(600, "random"), []
    for threads, needs in ((1, (True, True)), (2, (True, False)), (3, (False, True))):
        torch.set_num_threads(threads)
        answers.append(run(phi, 30.0, -1.0, loss, needs=needs))
    for answer in answers[1:]:
        assert all(x is None or torch.equal(x, first) for x, first in zip(answer, answers[0], strict=True))


@ISAS
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite(odd, loss, isa):
    """NaN and infinite φ reach the results as they do in plain PyTorch."""
    phi = phi_of(257, "random")
    phi[200, 3] = odd  # in the second block of rows
    found, expected = (run(phi, 1.0, 0.0, loss, backend=backend) for backend in ("cpu", "torch"))
    found, expected = (x[:1] + x[2:] for x in (found, expected))  # each has statistics of its own
    for x, y in zip(found, expected, strict=True):
        assert x is y is None or torch.equal(x.isnan(), y.isnan()) and torch.equal(x.isinf(), y.isinf())


@ISAS
@pytest.mark.parametrize("rows", [slice(None), slice(0, 128), slice(5, 6)], ids=str)
def test_logits_of_minus_infinity(rows, isa):
    """A column without a finite logit in some block of rows, or in all, and a row without one."""
    phi = phi_of(257, "random")
    phi[128:, 3] = -0.5  # far below 0 in the blocks after the first
    phi[rows, 3 if rows != slice(5, 6) else slice(None)] = -torch.inf
    found, expected = (run(phi, 200.0, 0.0, "infonce", backend=backend) for backend in ("cpu", "torch"))
    found, expected = (x[:1] + x[2:] for x in (found, expected))  # each has statistics of its own
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, equal_nan=True, rtol=1e-4, atol=1e-5)


def test_scalars_as_tensors(cpu_backend):
    """Scalars of any dtype and of one element give what numbers give."""
    phi = phi_of(33, "random")
    as_numbers = run(phi, 7.5, -2.0, "sigmoid")[0]
    value = torch.empty(())
    scale, bias = torch.tensor([7.5], dtype=torch.float64), torch.tensor(-2.0, dtype=torch.bfloat16)
    torch.ops.pacl_kernels.loss_forward(phi, scale, None, bias, None, "sigmoid", "cpu", value, None)
    assert torch.equal(value, as_numbers)
