"""Results have the same bits on every run and for any number of threads, and the loss has its symmetries."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from accuracy import assert_accurate, evaluate, natural_sizes
from gpu import on_gpu, on_hopper, random_inputs, step
from problems import FORMS, OBJECTIVES, Case, make

from pacl_kernels.backends import cpu
from pacl_kernels.backends.gpu import hopper

CASES = [
    Case(1, 1, 1),
    Case(13, 50, 65),
    Case(5, 197, 70, mask="random"),
    Case(3, 1369, 33, tau=0.01),
    Case(67, 9, 31, tau=1.0),
    Case(2, 700, 129, mask="first"),
]


def _assert_same_bits(one, two):
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


@pytest.mark.sampled(2)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_runs(case, form, target):
    for objective in case.objectives:
        problem = make(case, form, objective, target.dtype, target.device)
        first = evaluate(problem, target.backend)
        # Change the contents of the memory that the allocator hands out again.
        rubbish = [torch.full((size,), 7e8, device=target.device) for size in (100, 10_000, 1_000_000)]
        del rubbish
        _assert_same_bits(first, evaluate(problem, target.backend))


@on_gpu
@pytest.mark.parametrize("form", FORMS)
def test_same_bits_on_every_run(form):
    problem = make(Case(130, 196, 128, mask="random"), form, "infonce", torch.bfloat16, "cuda")
    first, second = (evaluate(problem, "triton") for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items() if value is not None)


@on_hopper
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "transposed"])
@pytest.mark.parametrize("form, patches", [("dot", 196), ("cosine", 196), ("cosine", 387)])
def test_a_thousand_runs_give_the_same_bits(cluster, monkeypatch, form, patches, transposed):
    """A result that changes shows a race; memory for the results is poisoned between runs."""
    monkeypatch.setattr(hopper.settings, "cosine_from_attention", True)
    monkeypatch.setattr(hopper.settings, "transposed_weights", transposed)
    inputs = random_inputs(96, patches, 512)
    first = step(inputs, form, "cuda")
    for _ in range(1000):
        poison = [torch.full_like(x, float("nan")) for x in first]
        del poison
        for x, y in zip(step(inputs, form, "cuda"), first, strict=True):
            assert torch.equal(x, y)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", [*CASES, Case(3, 50, 65, K=200), Case(200, 50, 65, K=3), Case(211, 3, 17)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_any_number_of_threads(case, form, dtype, cpu_backend):
    for objective in case.objectives:
        problem = make(case, form, objective, dtype)
        torch.set_num_threads(1)
        alone = evaluate(problem, cpu_backend)
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            assert torch.get_num_threads() == threads
            _assert_same_bits(alone, evaluate(problem, cpu_backend))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_permuted_batch(form, objective, target):
    """Permuting the pairs leaves the loss unchanged, and permutes gradients and compatibilities alike."""
    problem = make(Case(19, 7, 33, mask="random"), form, objective, target.dtype, target.device)
    order = torch.randperm(19, generator=torch.Generator().manual_seed(0)).to(target.device)
    permuted = {name: getattr(problem, name)[order] for name in ("patches", "texts", "patch_mask")}
    if objective == "compatibility":
        permuted["upstream"] = problem.upstream[order][:, order]
    expected = evaluate(problem, target.backend)
    answer = evaluate(replace(problem, **permuted), target.backend)
    for name in ("patches", "texts"):
        expected[name] = expected[name][order]
    if objective == "compatibility":
        expected["value"] = expected["value"][order][:, order]
    for name, size in natural_sizes(problem).items():
        if name in answer:
            assert_accurate(name, answer[name], expected[name], target.dtype, natural=size)


@pytest.mark.parametrize("form", FORMS)
def test_permuted_patches(form, target):
    """The patches of an image are a set: permuting them only permutes their gradients."""
    problem = make(Case(4, 53, 33, K=6), form, "compatibility", target.dtype, target.device)
    order = torch.randperm(53, generator=torch.Generator().manual_seed(0)).to(target.device)
    expected = evaluate(problem, target.backend)
    expected["patches"] = expected["patches"][:, order]
    answer = evaluate(replace(problem, patches=problem.patches[:, order]), target.backend)
    for name, value in answer.items():
        assert_accurate(name, value, expected[name], target.dtype)


@pytest.mark.parametrize("form", FORMS)
def test_scaled_embeddings(form, target):
    """Only directions matter: embeddings times a power of two give gradients divided by it exactly."""
    problem = make(Case(5, 21, 33), form, "infonce", target.dtype, target.device)
    problem = replace(problem, upstream=64.0)
    expected = evaluate(problem, target.backend)
    answer = evaluate(replace(problem, patches=4 * problem.patches, texts=problem.texts / 2), target.backend)
    expected["patches"] = expected["patches"] / 4
    expected["texts"] = expected["texts"] * 2
    for name, value in answer.items():
        assert_accurate(name, value, expected[name], target.dtype)


FORK = """
import os, signal, torch
from pacl_kernels import compatibility

def phi():  # the loss over it is torch's, which hangs in a forked process by itself
    return compatibility(patches, texts, form="cosine", backend="cpu").tolist()

torch.set_num_threads(2)
patches, texts = torch.randn(64, 50, 96), torch.randn(64, 96)
torch.randn(1 << 20).add_(1.0)  # torch's own threads exist now
before = phi()
child = os.fork()
if child == 0:
    signal.alarm(20)  # a deadlock ends the child, and the test says so
    os._exit(0 if phi() == before else 1)
assert os.waitpid(child, 0)[1] == 0, "the child gave something else, or nothing"
assert phi() == before
"""


def test_a_forked_process_works_too(cpu_backend):
    """A forked child computes the same and does not wait for the parent's threads, which it does not have."""
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_torchs_own_threads_do_the_work(cpu_backend):
    """On Linux the backend uses the OpenMP runtime of PyTorch's wheels; elsewhere it starts its own threads."""
    if sys.platform != "linux" or "OpenMP" not in torch.__config__.parallel_info():
        pytest.skip("no OpenMP here")
    assert all(cpu._openmp())


def test_borrowed_and_own_threads_give_the_same_bits(cpu_backend, monkeypatch):
    problem = make(Case(13, 50, 65, mask="random"), "cosine", "infonce")
    torch.set_num_threads(3)
    borrowed = evaluate(problem, cpu_backend)
    monkeypatch.setattr(cpu, "_openmp", lambda: (0, 0, 0))
    own = evaluate(problem, cpu_backend)
    assert all(torch.equal(own[name], value) for name, value in borrowed.items())
