"""What only a GPU can show. `pytest -m gpu` runs this file and every other test's rows for a GPU."""

import pytest
import torch
from accuracy import check, evaluate
from filelock import FileLock
from problems import FORMS, Case, make

from pacl_kernels import available_backends, backends, compatibility, fused_pacl_loss
from pacl_kernels.backends.gpu import launch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(available_backends()["triton"] is not None, reason="triton cannot run here"),
]
MIB = 2**20


def _inputs(b, n, d, dtype=torch.bfloat16, device="cuda"):
    patches = torch.randn(b, n, d, device=device, dtype=dtype, requires_grad=True)
    texts = torch.randn(b, d, device=device, dtype=dtype, requires_grad=True)
    scale, tau = (torch.tensor(x, device=device, requires_grad=True) for x in (20.0, 0.07))
    return patches, texts, scale, tau


@pytest.fixture
def gigabytes(tmp_path_factory):
    """For tests that take much of the GPU's memory: one at a time, of all processes, and none keeps it."""
    with FileLock(tmp_path_factory.getbasetemp().parent / "gigabytes.lock"):
        torch.cuda.empty_cache()
        yield
        torch.cuda.empty_cache()


def _step(inputs, form, **options):
    patches, texts, scale, tau = inputs
    loss = fused_pacl_loss(patches, texts, scale, attn_temperature=tau, form=form, **options)
    return [loss.detach(), *torch.autograd.grad(loss, inputs, allow_unused=True)]


def test_auto_takes_the_fastest():
    fastest = "cuda" if available_backends()["cuda"] is None else "triton"
    assert backends.resolve("auto", torch.device("cuda"), torch.bfloat16) == fastest
    assert backends.resolve("auto", torch.device("cuda"), torch.float32) == "triton"
    assert backends.resolve("auto", torch.device("cuda"), torch.float64) == "torch"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "case",
    [Case(64, 196, 512), Case(40, 256, 768), Case(24, 576, 1024), Case(300, 49, 64), Case(31, 729, 520)],
    ids=str,
)
def test_shapes_of_practice(case, dtype, form):
    check(make(case, form, "infonce", dtype, "cuda"), "triton")


@pytest.mark.parametrize("form", FORMS)
def test_large_batch_against_the_blockwise_backend(form):
    """B = 8192: the float64 formula does not fit, the blockwise backend in float32 does."""
    torch.manual_seed(0)
    inputs = _inputs(8192, 49, 256)
    ours = _step(inputs, form, backend="triton")
    wide = tuple(x.detach().float().requires_grad_() for x in inputs)
    truth = _step(wide, form, backend="torch")
    for mine, true in zip(ours[: 3 if form == "max" else 5], truth, strict=False):
        assert (mine.float() - true).norm() <= 1e-2 * true.norm()


@pytest.mark.parametrize("form", FORMS)
def test_the_host_never_waits(form):
    inputs = _inputs(64, 196, 128)
    _step(inputs, form)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        _step(inputs, form)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_of_unseen_size_compiles_nothing(form):
    """Once there are texts for whole tiles; `test_kernel_report.py` asks the same of Triton's rules without a GPU."""
    _step(_inputs(128, 196, 128), form)
    names = [name for name in vars(launch.kernels()) if name.endswith("_kernel")]

    def compiled():
        caches = [getattr(launch.kernels(), name).device_caches for name in names]
        return sum(len(cache[0]) for devices in caches for cache in devices.values())

    before = compiled()
    for b in (129, 130, 144, 200, 257, 1000):
        _step(_inputs(b, 196, 128), form)
    assert compiled() == before


@pytest.mark.parametrize("form", FORMS)
def test_cuda_graph_of_forward_and_backward(form):
    inputs = _inputs(64, 196, 128)
    expected = _step(inputs, form)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            _step(inputs, form)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _step(inputs, form)
    for _ in range(2):
        for x in captured:
            if x is not None:
                x.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        for mine, true in zip(captured, expected, strict=True):
            assert (mine is None) == (true is None) and (mine is None or torch.equal(mine, true))


@pytest.mark.parametrize("form", FORMS)
def test_several_streams(form):
    inputs = [_inputs(64, 196, 128) for _ in range(3)]
    expected = [_step(x, form) for x in inputs]
    torch.cuda.synchronize()
    streams, answers = [torch.cuda.Stream() for _ in inputs], []
    for _ in range(4):
        for stream, x in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                answers.append(_step(x, form))
    torch.cuda.synchronize()
    for i, answer in enumerate(answers):
        for mine, true in zip(answer, expected[i % 3], strict=True):
            assert mine is None or torch.equal(mine, true)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("form", FORMS)
def test_the_device_of_the_tensors_not_the_current_one(form):
    for device in ("cuda:1", "cuda:0"):
        problem = make(Case(6, 70, 40), form, "infonce", device=device)
        with torch.cuda.device(1 - torch.device(device).index):
            check(problem, "triton")


def test_offsets_beyond_32_bits(gigabytes):
    """Patches of more than 2³¹ elements: the last image's row is that of the same image alone."""
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


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("b", [4096, 32768])
def test_memory_of_a_step(b, form, gigabytes):
    """Beyond inputs and gradients: one float32 [K, D], three float32 [B, K], and at most 512 MiB."""
    n, d = 196, 512
    if torch.cuda.mem_get_info()[0] < 2.2 * 2 * b * n * d + 3 * 4 * b * b + 2**30:
        pytest.skip("too little memory")
    _step(_inputs(64, n, d), form)
    inputs = _inputs(b, n, d)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    answers = _step(inputs, form)
    assert all(x is None or x.isfinite().all() for x in answers[:1] + answers[2:])
    extra = torch.cuda.max_memory_allocated() - before - sum(x.numel() * x.element_size() for x in inputs)
    assert extra <= 4 * b * d + 3 * 4 * b * b + 512 * MIB, f"{extra / MIB:.0f} MiB"


@pytest.mark.parametrize("form", FORMS)
def test_same_bits_on_every_run(form):
    problem = make(Case(130, 196, 128, mask="random"), form, "infonce", torch.bfloat16, "cuda")
    first, second = (evaluate(problem, "triton") for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items() if value is not None)
