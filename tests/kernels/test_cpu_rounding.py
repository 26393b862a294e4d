"""When weights rounded to bfloat16 cancel in a gradient, the native backend runs again in float32."""

from dataclasses import replace

import pytest
import torch
from accuracy import check, check_case, evaluate
from problems import Case, make

from pacl_kernels import native

# Instruction sets that multiply pairs of bfloat16, each with the one whose float32 kernels it falls back on.
FALLBACK = {"avx512bf16": "avx512", "amx": "avx512", "emulated_amx": "avx2", "neonbf16": "baseline"}
CANCELLING = [
    Case(2, 5, 127, tau=0.148, scale=1.0, data="equal_images"),
    Case(5, 192, 130, tau=0.048, scale=0.008, data="equal_images"),
    Case(90, 3, 65, tau=0.07, scale=1.0, data="equal_images"),  # so many images that the rounding is sampled
    Case(6, 9, 65, tau=0.3, scale=1.0, data="equal_images", mask="first"),
    Case(4, 50, 128, tau=0.05, scale=1.0, data="equal_texts"),
    Case(5, 13, 70, tau=0.4, scale=1.0, data="equal_texts"),
    Case(5, 13, 70, tau=0.1, scale=1.0, data="duplicated"),
    # Here φ must come from the same kernels as the scores from which it is subtracted.
    Case(4, 37, 64, K=3, tau=4e-6, data="near_1e-3", mask="one"),
]
ORDINARY = [
    Case(21, 30, 130),
    Case(9, 50, 130, K=40, tau=0.02, mask="random"),
    Case(33, 20, 64, tau=1.0, scale=100.0),
    Case(90, 5, 64, data="random"),
]


@pytest.fixture(params=FALLBACK)
def isa(request, cpu_backend, monkeypatch) -> str:
    if request.param not in native.native().isas():
        pytest.skip(f"this machine has no {request.param}")
    monkeypatch.setenv("PACL_CPU_ISA", request.param)
    return request.param


@pytest.mark.parametrize("form", ["dot", "cosine"])
@pytest.mark.parametrize("case", CANCELLING, ids=str)
def test_weights_that_cancel(case, form, isa, cpu_backend):
    for objective in case.objectives:
        check_case(case, form, objective, cpu_backend, torch.bfloat16)


@pytest.mark.parametrize("form", ["dot", "cosine"])
@pytest.mark.parametrize("case", ORDINARY, ids=str)
def test_other_weights_stay_in_bfloat16(case, form, isa, cpu_backend, monkeypatch):
    """Ordinary batches do not trigger the second run, which costs several times the first and changes the bits."""
    for objective in case.objectives:
        problem = make(case, form, objective, torch.bfloat16)
        monkeypatch.setenv("PACL_CPU_ISA", isa)
        answer = evaluate(problem, cpu_backend)
        monkeypatch.setenv("PACL_CPU_ISA", FALLBACK[isa])
        exact = evaluate(problem, cpu_backend)
        for name in ("patches", "texts"):
            assert not torch.equal(answer[name], exact[name]), name


@pytest.mark.parametrize("form", ["dot", "cosine"])
@pytest.mark.parametrize("tau", [0.02, 0.07, 0.3, 1.0])
def test_texts_that_share_a_direction_as_those_of_clip(tau, form, isa, cpu_backend, monkeypatch):
    """Cosines of about 0.7 among texts and 0.5 among patches do not count as a collapse."""
    problem = make(Case(24, 30, 128, tau=tau, scale=100.0, data="random"), form, "infonce", torch.bfloat16)
    shared = torch.randn(2, 128, generator=torch.Generator().manual_seed(1))
    patches = 0.5**0.5 * (shared[0] + problem.patches.float())
    texts = 0.7**0.5 * shared[1] + 0.3**0.5 * problem.texts.float()
    problem = replace(problem, patches=patches.bfloat16(), texts=texts.bfloat16())
    answer = check(problem, cpu_backend)
    monkeypatch.setenv("PACL_CPU_ISA", FALLBACK[isa])
    exact = evaluate(problem, cpu_backend)
    assert all(not torch.equal(answer[name], exact[name]) for name in ("patches", "texts"))


def test_the_second_run_is_that_of_float32(isa, cpu_backend, monkeypatch):
    """After the second run, gradients are bit-identical to those of the instruction set without bfloat16."""
    problem = make(CANCELLING[1], "dot", "compatibility", torch.bfloat16)
    problem = replace(problem, upstream=problem.upstream - problem.upstream.mean(0))  # a loss's g depends on φ's bits
    answer = evaluate(problem, cpu_backend)
    monkeypatch.setenv("PACL_CPU_ISA", FALLBACK[isa])
    exact = evaluate(problem, cpu_backend)
    assert all(torch.equal(answer[name], exact[name]) for name in ("patches", "texts", "attn_temperature"))
