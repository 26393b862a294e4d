"""Tests of every instruction set that the native CPU backend is compiled for, selected by PACL_CPU_ISA."""

import os
import subprocess
import sys

import pytest
import torch
from accuracy import check, check_case, evaluate
from problems import FORMS, ISAS, Case, make

from pacl_kernels import compatibility
from pacl_kernels.native import native

CASES = [
    Case(1, 1, 1),
    Case(3, 5, 2),
    Case(5, 49, 67),
    Case(17, 13, 31, mask="random"),
    Case(3, 21, 19, K=47, mask="first"),
    Case(2, 197, 130, K=49),
    Case(2, 1369, 33, K=5),
    Case(49, 15, 64, tau=0.01, scale=100.0),
    Case(9, 50, 65, tau=10.0),
    Case(6, 30, 70, data="norms"),
    Case(5, 9, 33, data="zero_patches"),
    Case(5, 9, 33, data="nan"),
    Case(4, 24, 5, K=51, tau=0.01, data="duplicated"),
    Case(5, 26, 56, K=40, data="opposite"),  # the cosine form's pooled patches nearly cancel
    Case(9, 10, 16, K=14, tau=0.2, layout="expanded_last"),
    Case(3, 50, 48, K=40),  # N exceeds D by two, by one, or not: pooled directly, or not, however rows are padded
    Case(3, 50, 49, K=40, mask="random"),
    Case(3, 50, 52, K=40),
    Case(4, 50, 48, layout="strided"),
    Case(4, 50, 48, layout="offset"),
    # D is a multiple of the unit, so that rows are read in place, or nearly so.
    Case(13, 50, 64, layout="spaced"),
    Case(13, 50, 128, layout="offset"),
    Case(9, 50, 64, K=40, mask="random"),
    Case(12, 32, 128, K=70),
    Case(9, 50, 128, layout="expanded_last"),
    # More than one block of rows, of images with means, of texts, of units of D; an image of many tiles.
    Case(40, 50, 64, K=33),
    Case(70, 5, 66, K=40, tau=2.0),
    Case(3, 20, 64, K=1100),
    Case(2, 40, 1100, K=33),
    Case(2, 333, 70, K=40),
    # One patch takes all the attention: s - φ must be exactly 0, because τ would magnify any other value.
    Case(8, 1, 7, K=16, tau=1e-4),
    Case(8, 1, 7, tau=1e-6),
    Case(4, 9, 70, K=6, tau=1e-12, mask="random"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_accuracy(case, dtype, form, isa, cpu_backend):
    for objective in case.objectives:
        check_case(case, form, objective, cpu_backend, dtype)


@pytest.mark.parametrize("form", FORMS[:2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [Case(5, 1, 70, K=3, tau=1.2e-38), Case(3, 50, 130, K=5, tau=1.2e-38, mask="random")])
def test_smallest_temperature(case, dtype, form, isa, cpu_backend):
    """The smallest normal float32 works as τ; only the temperature's gradient, which has a factor 1 / τ², overflows."""
    check(make(case, form, "compatibility", dtype), cpu_backend, needs=("patches", "texts"))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_gradients_in_memory_that_nobody_has_touched(dtype, form, cpu_backend):
    """Fresh memory, written by other instructions than used memory, receives every gradient with the same bits."""
    problem = make(Case(40, 200, 2500, K=2), form, "compatibility", dtype)  # 40 MB or more: malloc returns fresh pages
    phi, state = torch.empty_like(problem.upstream), torch.empty_like(problem.upstream)
    inputs = (problem.patches, problem.texts, None, None, 0.1, form, cpu_backend, phi, state)
    torch.ops.pacl_kernels.compatibility_forward(*inputs, None)
    fresh, used = torch.empty_like(problem.patches), torch.full_like(problem.patches, torch.nan)
    for gradient in (fresh, used):
        torch.ops.pacl_kernels.compatibility_backward(*inputs, problem.upstream, gradient, None, None, None)
    assert torch.equal(fresh, used)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_threads(dtype, form, isa, cpu_backend):
    problem = make(Case(13, 50, 65, mask="random"), form, "infonce", dtype)
    answers = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        answers.append(evaluate(problem, cpu_backend))
    for answer in answers[1:]:
        assert all(torch.equal(answer[name], value) for name, value in answers[0].items())


def test_the_choice_has_an_effect(cpu_backend, monkeypatch):
    """PACL_CPU_ISA changes the bits, because other vector lengths sum in another order."""
    problem = make(Case(5, 197, 333), "dot", "compatibility")
    answers = {}
    for name in native().isas():
        monkeypatch.setenv("PACL_CPU_ISA", name)
        assert native().cpu_isa() == name
        answers[name] = evaluate(problem, cpu_backend)["patches"]
    baseline = answers.pop("baseline")
    assert not answers or any(not torch.equal(answer, baseline) for answer in answers.values())


@pytest.mark.parametrize("name", [*ISAS, "avx1024", "AVX2", "avx2 "])
def test_a_name_that_is_unknown_or_absent(name, cpu_backend, monkeypatch):
    """The error names the variable, its value and the allowed values; the variable is read on each call."""
    problem = make(Case(), "dot", "infonce")
    evaluate(problem, cpu_backend)
    monkeypatch.setenv("PACL_CPU_ISA", name)
    if name in native().isas():
        check(problem, cpu_backend)
    else:
        with pytest.raises(ValueError, match=f"PACL_CPU_ISA is '{name}'.*expected.*baseline") as caught:
            evaluate(problem, cpu_backend)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tau", (0.02, 0.1, 1.0))
def test_phi_of_bfloat16_is_exact_to_1e_5(tau, form, isa, cpu_backend):
    """No step towards φ rounds to bfloat16, because φ is float32 and is later multiplied by a logit scale."""
    problem = make(Case(9, 197, 130, K=40, tau=tau), form, "compatibility", torch.bfloat16)
    phi, state = torch.empty_like(problem.upstream), torch.empty_like(problem.upstream)
    torch.ops.pacl_kernels.compatibility_forward(
        problem.patches, problem.texts, None, None, tau, form, cpu_backend, phi, state, None
    )
    patches, texts = problem.patches.double(), problem.texts.double()
    truth = compatibility(patches, texts, attn_temperature=tau, form=form, backend="reference")
    assert (phi - truth).abs().max() < 1e-5


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lends the matrix unit on demand")
def test_a_refused_matrix_unit(cpu_backend):
    """Linux refuses AMX if the signal stack is too small for the tiles; then the next best instruction set runs."""
    script = """
import ctypes
class Stack(ctypes.Structure):
    _fields_ = [("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
memory = ctypes.create_string_buffer(4096)
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(Stack(ctypes.addressof(memory), 0, 4096)), None) == 0
import torch, pacl_kernels
from pacl_kernels.native import native
x = torch.randn(3, 20, 80).bfloat16()
phi = [pacl_kernels.compatibility(x, x[0], backend=name).float() for name in ("cpu", "reference")]
assert (phi[0] - phi[1]).abs().max() < 0.02
print(*native().isas())
"""
    environment = {name: value for name, value in os.environ.items() if name != "PACL_CPU_ISA"}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [name for name in native().isas() if name != "amx"]


def test_default_is_the_best_there_is(cpu_backend, monkeypatch):
    """Without the variable, or with an empty one, the last instruction set of the list runs."""
    best = native().isas()[-1]
    assert "baseline" in native().isas() and set(native().isas()) <= set(ISAS)
    for dtype in DTYPES:
        problem = make(Case(5, 197, 333), "cosine", "infonce", dtype)
        answers = []
        for value in (None, "", best):
            if value is not None:
                monkeypatch.setenv("PACL_CPU_ISA", value)
            assert native().cpu_isa() == best
            answers.append(evaluate(problem, cpu_backend))
        monkeypatch.delenv("PACL_CPU_ISA")
        for answer in answers[1:]:
            assert all(torch.equal(answers[0][name], value) for name, value in answer.items())
