"""The Hopper kernels on hardware, beside the rows that every other test has for them (`pytest -m gpu -k cuda-cuda`)."""

import pytest
import torch
from accuracy import check
from problems import Case, make

from pacl_kernels import available_backends, compatibility, fused_pacl_loss
from pacl_kernels.backends.gpu import hopper

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(available_backends()["cuda"] is not None, reason="backend 'cuda' cannot run here"),
]
DTYPES = [torch.bfloat16, torch.float16]
CASES = [
    *(Case(40, n, 136) for n in (1, 16, 49, 64, 97, 128, 129, 144, 169, 196, 197, 200, 225, 256, 257, 441, 576, 1369)),
    *(Case(64, 196, d) for d in (1, 8, 63, 64, 65, 512, 768, 1024, 1152, 2048)),
    *(Case(300, 49, 64, mask="random"), Case(31, 729, 520, mask="random"), Case(64, 196, 512, tau=0.01)),
]


@pytest.fixture(params=[1, 2], ids="cluster{}".format)
def cluster(request, monkeypatch):
    monkeypatch.setattr(hopper.settings, "cluster", request.param)


@pytest.fixture(params=[False, True], ids=["triton", "in-memory"])
def in_memory(request, monkeypatch):
    """Where the cosine form has its attention in memory: in kernels of Triton, or the backend's own."""
    monkeypatch.setattr(hopper.settings, "cosine_from_attention", request.param)
    return request.param


@pytest.mark.parametrize("form", ["dot", "cosine"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_shapes(cluster, case, dtype, form):
    check(make(case, form, "infonce", dtype, "cuda"), "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if not 97 <= case.N <= 256], ids=str)
def test_an_attention_in_memory(cluster, monkeypatch, case, dtype):
    monkeypatch.setattr(hopper.settings, "cosine_from_attention", True)
    check(make(case, "cosine", "infonce", dtype, "cuda"), "cuda")


def _inputs(b, n, d, dtype=torch.bfloat16):
    generator = torch.Generator("cuda").manual_seed(0)
    patches = torch.randn(b, n, d, device="cuda", generator=generator).to(dtype).requires_grad_()
    texts = torch.randn(b, d, device="cuda", generator=generator).to(dtype).requires_grad_()
    scale, tau = (torch.tensor(x, device="cuda", requires_grad=True) for x in (20.0, 0.07))
    return patches, texts, scale, tau


def _step(inputs, form, backend="cuda"):
    patches, texts, scale, tau = inputs
    loss = fused_pacl_loss(patches, texts, scale, attn_temperature=tau, form=form, backend=backend)
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("form", ["dot", "cosine"])
def test_a_large_batch_against_triton(form):
    inputs = _inputs(4096, 196, 512)
    for mine, other in zip(_step(inputs, form), _step(inputs, form, "triton"), strict=True):
        assert (mine.float() - other.float()).norm() <= 1e-2 * other.float().norm()


@pytest.mark.parametrize("form, patches", [("dot", 196), ("cosine", 196), ("cosine", 387)])
def test_a_thousand_runs_give_the_same_bits(cluster, monkeypatch, form, patches):
    """A moving result is a race. The memory that the results land in is poisoned in between."""
    monkeypatch.setattr(hopper.settings, "cosine_from_attention", True)
    inputs = _inputs(96, patches, 512)
    first = _step(inputs, form)
    for _ in range(1000):
        poison = [torch.full_like(x, float("nan")) for x in first]
        del poison
        for x, y in zip(_step(inputs, form), first, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("form", ["dot", "cosine"])
def test_another_stream_and_a_graph(form):
    inputs = _inputs(64, 196, 128)
    expected = _step(inputs, form)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for mine, true in zip(_step(inputs, form), expected, strict=True):
            assert torch.equal(mine, true)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _step(inputs, form)
    for x in captured:
        x.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    for mine, true in zip(captured, expected, strict=True):
        assert torch.equal(mine, true)


@pytest.mark.parametrize("form", ["dot", "cosine"])
def test_the_host_never_waits(form):
    inputs = _inputs(64, 196, 128)
    _step(inputs, form)
    torch.cuda.set_sync_debug_mode("error")
    try:
        _step(inputs, form)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_small_for_the_sanitizer(cluster, in_memory):
    """Every kernel once, on little: what compute-sanitizer runs."""
    for n in (49, 196, 256, 387):
        for form in ("dot", "cosine"):
            check(make(Case(6, n, 72, mask="random"), form, "infonce", torch.bfloat16, "cuda"), "cuda")
    inputs = _inputs(3, 196, 72)
    compatibility(inputs[0], inputs[1], attn_temperature=0.01, backend="cuda")
