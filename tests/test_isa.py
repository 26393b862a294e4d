"""Each instruction set that the native CPU backend is compiled for, forced by PACL_CPU_ISA."""

import pytest
import torch
from accuracy import check, evaluate
from problems import FORMS, Case, make

ISAS = ("baseline", "avx2", "avx512", "avx512bf16", "amx", "emulated_amx")  # the last in builds with sanitizers
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
    Case(3, 50, 48, K=40),  # one patch more than D or two: pooled directly, or not, whichever way rows are padded
    Case(3, 50, 49, K=40, mask="random"),
    Case(3, 50, 52, K=40),
    Case(4, 50, 48, layout="strided"),
    Case(4, 50, 48, layout="offset"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=ISAS)
def isa(request, cpu_backend, monkeypatch) -> str:
    """PACL_CPU_ISA set to that name."""
    if request.param not in _native().isas():
        pytest.skip(f"this machine has no {request.param}")
    monkeypatch.setenv("PACL_CPU_ISA", request.param)
    return request.param


def _native():
    from pacl_kernels import _native

    return _native


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_accuracy(case, dtype, form, isa, cpu_backend):
    for objective in case.objectives:
        check(make(case, form, objective, dtype), cpu_backend)


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
    """Different vector lengths add in a different order, so the bits tell that another instruction set ran."""
    problem = make(Case(5, 197, 333), "dot", "compatibility")
    answers = {}
    for name in _native().isas():
        monkeypatch.setenv("PACL_CPU_ISA", name)
        assert _native().cpu_isa() == name
        answers[name] = evaluate(problem, cpu_backend)["patches"]
    baseline = answers.pop("baseline")
    assert not answers or any(not torch.equal(answer, baseline) for answer in answers.values())


@pytest.mark.parametrize("name", [*ISAS, "avx1024", "AVX2", "avx2 "])
def test_a_name_that_is_unknown_or_absent(name, cpu_backend, monkeypatch):
    """An error that names the variable, what it holds and what it may hold; it is read on each call."""
    problem = make(Case(), "dot", "infonce")
    evaluate(problem, cpu_backend)
    monkeypatch.setenv("PACL_CPU_ISA", name)
    if name in _native().isas():
        check(problem, cpu_backend)
    else:
        with pytest.raises(ValueError, match=f"PACL_CPU_ISA is '{name}'.*expected.*baseline") as caught:
            evaluate(problem, cpu_backend)
        assert "\n" not in str(caught.value)


def test_default_is_the_best_there_is(cpu_backend, monkeypatch):
    """Without the variable the last of the list runs; an empty one counts as none."""
    best = _native().isas()[-1]
    assert "baseline" in _native().isas() and set(_native().isas()) <= set(ISAS)
    for dtype in DTYPES:
        problem = make(Case(5, 197, 333), "cosine", "infonce", dtype)
        answers = []
        for value in (None, "", best):
            if value is not None:
                monkeypatch.setenv("PACL_CPU_ISA", value)
            assert _native().cpu_isa() == best
            answers.append(evaluate(problem, cpu_backend))
        monkeypatch.delenv("PACL_CPU_ISA")
        for answer in answers[1:]:
            assert all(torch.equal(answers[0][name], value) for name, value in answer.items())
