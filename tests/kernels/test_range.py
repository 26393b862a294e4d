"""Norms and temperatures at the limits of a dtype, rows without a direction, and rows that are not finite."""

from dataclasses import replace

import pytest
import torch
from accuracy import assert_accurate, check, check_case, evaluate, natural_sizes
from problems import FORMS, Case, make

from pacl_kernels import available_backends

BACKENDS = tuple(name for name in ("torch", "cpu") if available_backends()[name] is None)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PAIRS = [(name, dtype) for name in BACKENDS for dtype in DTYPES if name == "torch" or dtype != torch.float64]


@pytest.mark.parametrize("backend, dtype", PAIRS, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("data", ["huge", "tiny"])
def test_norms_near_the_limits(data, form, dtype, backend):
    """Norms may be as large as the dtype allows, where squares overflow, or too small to define a direction."""
    for case in (Case(data=data), Case(N=1, D=1, data=data), Case(6, 30, 70, tau=0.01, data=data, mask="random")):
        for objective in case.objectives:
            check_case(case, form, objective, backend, dtype)


@pytest.mark.parametrize("backend", (*BACKENDS, "reference"))
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("exponent", [-30, 60, 100])
def test_a_power_of_two_changes_only_the_size_of_a_gradient(exponent, form, backend):
    problem = make(Case(4, 9, 33, K=5), form, "compatibility")
    factor = 2.0**exponent
    for name in ("patches", "texts"):
        expected = evaluate(problem, backend)
        answer = evaluate(replace(problem, **{name: getattr(problem, name) * factor}), backend)
        answer[name] *= factor
        assert all(torch.equal(answer[part], x) for part, x in expected.items())


@pytest.mark.parametrize("dtype", DTYPES[:2] + DTYPES[3:], ids=str)
def test_the_formula_itself_holds_every_norm(dtype):
    """The reference holds norms of any size in float32, the plain formula, and in float64, the truth."""
    problem = make(Case(6, 30, 70, data="huge"), "dot", "compatibility", dtype)
    wide = torch.promote_types(dtype, torch.float32)
    values = [evaluate(problem.to(x), "reference") for x in (wide, torch.float64)]
    for name, true in values[1].items():
        assert true.isfinite().all()
        natural = natural_sizes(problem)[name]
        assert_accurate(name, values[0][name], true, wide, natural=natural)
    assert (values[1]["value"] != 0).all()
    if dtype == torch.float64:
        smaller = {name: getattr(problem, name) * 2.0**-900 for name in ("patches", "texts")}
        torch.testing.assert_close(evaluate(replace(problem, **smaller), "reference")["value"], values[1]["value"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("N", [1, 9])
@pytest.mark.parametrize("form", FORMS[:2])
def test_a_temperature_near_0_is_the_best_patch(form, N, dtype, backend):
    """For τ → 0 the best patch takes all attention, with s - φ = 0 exactly, so that dividing by τ does no harm."""
    problem = make(Case(8, N, 7, K=16), form, "compatibility", dtype)
    expected = evaluate(replace(problem, form="max"), backend)
    sizes = natural_sizes(problem)
    for tau in (1e-8, 1e-12, 1e-20, 1e-30, 1e-38, 1e-42):
        answer = evaluate(replace(problem, attn_temperature=torch.tensor(tau)), backend)
        assert answer["attn_temperature"] == 0
        for name in ("value", "patches", "texts"):
            assert_accurate(f"{name}, τ {tau}", answer[name], expected[name], dtype, natural=sizes[name])


@pytest.mark.parametrize("backend, dtype", PAIRS, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("data", ["zero_patches", "zero_texts"])
def test_a_row_without_a_direction_has_no_gradient(data, form, dtype, backend):
    """A row without a direction has gradient 0, not 0 x NaN, even if another row makes the loss NaN."""
    problem = make(Case(5, 7, 33, data=data), form, "infonce", dtype)
    patches = problem.patches.clone()
    patches[-1, -1, -1] = float("nan")
    answer = check(replace(problem, patches=patches), backend)
    assert answer["value"].isnan()
    for name, x in (("patches", patches), ("texts", problem.texts)):
        zero = (x == 0).all(-1)
        assert (answer[name][zero] == 0).all() and answer[name][~zero & (name == "texts")].isnan().all()
