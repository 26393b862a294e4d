"""φ, the losses and every gradient agree with float64, also for unusual shapes and contents."""

import pytest
import torch
from accuracy import assert_accurate, check, check_case, evaluate
from gpu import on_gpu, on_hopper, random_inputs, step
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems import CONTENTS, FORMS, LAYOUTS, LONG_OPPOSITE, SHAPES, Case, make

from pacl_kernels import compatibility
from pacl_kernels.backends.gpu import hopper


@pytest.mark.sampled(4)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_shapes(case, form, target):
    _check(case, form, target)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CONTENTS, ids=str)
def test_contents(case, form, target):
    _check(case, form, target)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_layouts(case, form, target):
    problem = make(case, form, "compatibility", target.dtype, target.device)
    contiguous = case.layout == "offset"
    assert problem.patches.is_contiguous() == contiguous and problem.texts.is_contiguous() == contiguous
    _check(case, form, target)


@given(
    case=st.builds(
        Case,
        B=st.integers(1, 20),
        N=st.integers(1, 70),
        D=st.integers(1, 140),
        K=st.none() | st.integers(1, 60),
        tau=st.sampled_from([0.01, 0.03, 0.05, 0.07, 0.2, 1.0, 3.0, 10.0]),
        scale=st.sampled_from([1.0, 14.3, 100.0]),
        data=st.sampled_from(["related", "random", "aligned", "zero_patches", "zero_texts", "duplicated", "large"]),
        mask=st.sampled_from([None, "random", "one", "first"]),
        layout=st.sampled_from(["contiguous", "offset", "strided", "spaced", "permuted"]),
    ),
    form=st.sampled_from(FORMS),
    seed=st.integers(0, 2**16),
)
@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # safe: nothing here changes what the fixture restores
)
def test_anything(case, form, seed, target):
    _check(case, form, target, seed)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", LONG_OPPOSITE, ids=str)
def test_long_patches_that_cancel(case, form, target):
    """Gradients are accurate when p and -p cancel, although they are much smaller than the weights they sum."""
    _check(case, form, target)


@pytest.mark.parametrize("case", [Case(N=2, data="cancelled"), Case(N=9, tau=0.01, data="cancelled")], ids=str)
def test_pooled_norm_at_its_floor(case, target):
    """If patches cancel exactly, φ = 0 / 1e-6, and the gradient treats the floor of the norm as a constant."""
    for objective in case.objectives:
        problem = make(case, "cosine", objective, target.dtype, target.device)
        check(problem, target.backend)


@pytest.mark.parametrize("form", FORMS)
def test_every_row_counts(form, single):
    """When norms differ by orders of magnitude, rows with large norms, whose gradients are small, are accurate too."""
    problem = make(Case(6, 30, 70, data="norms"), form, "compatibility", device=single.device)
    answer = evaluate(problem, single.backend)
    truth, plain = (evaluate(problem.to(dtype), "reference") for dtype in (torch.float64, torch.float32))
    for name, natural in (("patches", 30**-0.5), ("texts", 1.0)):
        norms = getattr(problem, name).double().norm(dim=-1, keepdim=True)
        of_unit = [x[name].double() * norms for x in (answer, truth, plain)]
        natural *= problem.upstream.norm().item()
        assert_accurate(name, *of_unit[:2], torch.float32, of_unit[2], natural)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("K", [5, 3])
def test_nan_and_inf_pass_through(form, K, target):
    """A NaN or an inf in a real patch spoils what depends on it, as in PyTorch, and nothing else."""
    case = Case(B=5, N=7, D=33, K=None if K == 5 else K, data="nan")
    answer = check_case(case, form, "compatibility", target.backend, target.dtype, target.device)
    assert answer["value"][[0, -1]].isnan().all() and answer["value"][1:-1].isfinite().all()
    for objective in case.objectives[1:]:
        assert check_case(case, form, objective, target.backend, target.dtype, target.device)["value"].isnan()


def _check(case, form, target, seed=0):
    try:
        for objective in case.objectives:
            check_case(case, form, objective, target.backend, target.dtype, target.device, seed)
    except AssertionError as error:
        gap = _known_gap(case, form, target)
        if gap is None:
            raise
        pytest.xfail(f"{gap}: {error}")


def _known_gap(case, form, target) -> str | None:
    """Return why a GPU misses the tolerance, with figures of an H200, or None."""
    if target.device != "cuda" or target.backend == "torch":
        return None
    if form == "cosine" and case.N > 64 * case.D:
        return "pooled patches nearly cancel, and so do the Gram matrix and what it adds to W's product (5 times)"
    if target.dtype == torch.float32:
        return None
    if form == "dot" and case.data == "opposite" and case.tau == 10.0:
        return "W has 16 bits, and the texts' gradient is a small difference of it (up to 6 times the tolerance)"
    if form == "cosine" and target.dtype == torch.float16 and case.scale == 100.0:
        return "the attention has 16 bits, and the logits are 100 times φ (1.2 times the tolerance)"
    return None


@on_gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "case",
    [Case(64, 196, 512), Case(40, 256, 768), Case(24, 576, 1024), Case(300, 49, 64), Case(31, 729, 520)],
    ids=str,
)
def test_shapes_of_practice(case, dtype, form):
    check(make(case, form, "infonce", dtype, "cuda"), "triton")


@on_gpu
@pytest.mark.parametrize("form", FORMS)
def test_large_batch_against_the_blockwise_backend(form):
    """At B = 8192, where the float64 formula does not fit, Triton agrees with the blockwise backend in float32."""
    inputs = random_inputs(8192, 49, 256)
    ours = step(inputs, form, "triton")
    wide = tuple(x.detach().float().requires_grad_() for x in inputs)
    truth = step(wide, form, "torch")
    for mine, true in zip(ours[: 3 if form == "max" else 5], truth, strict=False):
        assert (mine.float() - true).norm() <= 1e-2 * true.norm()


@on_gpu
def test_offsets_beyond_32_bits(gigabytes):
    """With more than 2³¹ elements of patches, the last images have the same φ and gradient as alone."""
    b, n, d = 2**31 // (196 * 512) + 40, 196, 512
    if torch.cuda.mem_get_info()[0] < 3 * 2 * b * n * d:
        pytest.skip("too little memory")
    patches = torch.randn(b, n, d, device="cuda", dtype=torch.bfloat16).requires_grad_()
    texts = torch.randn(3, d, device="cuda", dtype=torch.bfloat16)
    phi = compatibility(patches, texts, attn_temperature=0.1)
    phi.sum().backward()
    last = patches[-2:].detach().requires_grad_()
    alone = compatibility(last, texts, attn_temperature=0.1)
    alone.sum().backward()
    torch.testing.assert_close(phi[-2:], alone)
    torch.testing.assert_close(patches.grad[-2:], last.grad)


HOPPER_DTYPES = [torch.bfloat16, torch.float16]
HOPPER_CASES = [
    *(Case(40, n, 136) for n in (1, 16, 49, 64, 97, 128, 129, 144, 169, 196, 197, 200, 225, 256, 257, 441, 576, 1369)),
    *(Case(64, 196, d) for d in (1, 8, 63, 64, 65, 512, 768, 1024, 1152, 2048)),
    *(Case(300, 49, 64, mask="random"), Case(31, 729, 520, mask="random"), Case(64, 196, 512, tau=0.01)),
]


@on_hopper
@pytest.mark.parametrize("form", ["dot", "cosine"])
@pytest.mark.parametrize("dtype", HOPPER_DTYPES, ids=str)
@pytest.mark.parametrize("case", HOPPER_CASES, ids=str)
def test_hopper_shapes(cluster, case, dtype, form):
    check(make(case, form, "infonce", dtype, "cuda"), "cuda")


@pytest.fixture(params=[False, True], ids=["triton", "in-memory"])
def in_memory(request, monkeypatch):
    """Choose the kernels that keep cosine's attention in memory: Triton's, or the backend's own."""
    monkeypatch.setattr(hopper.settings, "cosine_from_attention", request.param)


@on_hopper
@pytest.mark.parametrize("in_memory", [True], ids=["in-memory"], indirect=True)
@pytest.mark.parametrize("dtype", HOPPER_DTYPES, ids=str)
@pytest.mark.parametrize("case", [case for case in HOPPER_CASES if not 97 <= case.N <= 256], ids=str)
def test_hopper_attention_in_memory(cluster, in_memory, case, dtype):
    check(make(case, "cosine", "infonce", dtype, "cuda"), "cuda")


@on_hopper
@pytest.mark.parametrize("form", ["dot", "cosine"])
@pytest.mark.parametrize("case", HOPPER_CASES, ids=str)
def test_hopper_transposed_weights(cluster, monkeypatch, case, form):
    monkeypatch.setattr(hopper.settings, "cosine_from_attention", True)
    monkeypatch.setattr(hopper.settings, "transposed_weights", True)
    check(make(case, form, "infonce", torch.bfloat16, "cuda"), "cuda")


@on_hopper
@pytest.mark.parametrize("form", ["dot", "cosine"])
def test_a_large_batch_against_triton(form):
    inputs = random_inputs(4096, 196, 512)
    for mine, other in zip(step(inputs, form, "cuda"), step(inputs, form, "triton"), strict=True):
        assert (mine.float() - other.float()).norm() <= 1e-2 * other.float().norm()


@on_hopper
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "transposed"])
def test_small_for_the_sanitizer(cluster, in_memory, monkeypatch, transposed):
    """Every kernel runs on small inputs; compute-sanitizer runs this test."""
    monkeypatch.setattr(hopper.settings, "transposed_weights", transposed)
    for n in (49, 196, 256, 387):
        for form in ("dot", "cosine"):
            check(make(Case(6, n, 72, mask="random"), form, "infonce", torch.bfloat16, "cuda"), "cuda")
    inputs = random_inputs(3, 196, 72)
    compatibility(inputs[0], inputs[1], attn_temperature=0.01, backend="cuda")
