"""The host never waits for the GPU; streams, CUDA graphs and several devices give the same bits."""

import pytest
import torch
from accuracy import check
from gpu import ON_GPU, ON_HOPPER, on_gpu, on_hopper, random_inputs, step
from problems import FORMS, Case, make

BACKENDS = [
    *(pytest.param("auto", form, marks=ON_GPU) for form in FORMS),
    *(pytest.param("cuda", form, marks=ON_HOPPER) for form in ("dot", "cosine")),
]


@pytest.mark.parametrize("backend, form", BACKENDS)
def test_the_host_never_waits(backend, form):
    inputs = random_inputs(64, 196, 128)
    step(inputs, form, backend)  # the first step compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(inputs, form, backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
@pytest.mark.parametrize("form", FORMS)
def test_cuda_graph_of_forward_and_backward(form):
    inputs = random_inputs(64, 196, 128)
    expected = step(inputs, form)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step(inputs, form)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(inputs, form)
    for _ in range(2):
        for x in captured:
            if x is not None:
                x.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        for mine, true in zip(captured, expected, strict=True):
            assert (mine is None) == (true is None) and (mine is None or torch.equal(mine, true))


@on_hopper
@pytest.mark.parametrize("form", ["dot", "cosine"])
def test_another_stream_and_a_graph(form):
    inputs = random_inputs(64, 196, 128)
    expected = step(inputs, form, "cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for mine, true in zip(step(inputs, form, "cuda"), expected, strict=True):
            assert torch.equal(mine, true)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(inputs, form, "cuda")
    for x in captured:
        x.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    for mine, true in zip(captured, expected, strict=True):
        assert torch.equal(mine, true)


@on_gpu
@pytest.mark.parametrize("form", FORMS)
def test_several_streams(form):
    inputs = [random_inputs(64, 196, 128, seed=seed) for seed in range(3)]
    expected = [step(x, form) for x in inputs]
    torch.cuda.synchronize()
    streams, answers = [torch.cuda.Stream() for _ in inputs], []
    for _ in range(4):
        for stream, x in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                answers.append(step(x, form))
    torch.cuda.synchronize()
    for i, answer in enumerate(answers):
        for mine, true in zip(answer, expected[i % 3], strict=True):
            assert mine is None or torch.equal(mine, true)


@on_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("form", FORMS)
def test_the_device_of_the_tensors_not_the_current_one(form):
    for device in ("cuda:1", "cuda:0"):
        problem = make(Case(6, 70, 40), form, "infonce", device=device)
        with torch.cuda.device(1 - torch.device(device).index):
            check(problem, "triton")
