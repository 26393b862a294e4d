"""`torch.compile` takes the loss whole and gives eager's numbers; the operators keep the promises of their schemas."""

from dataclasses import replace

import pytest
import torch
from accuracy import assert_accurate, call, natural_sizes
from problems import DIFFERENTIABLE, FORMS, Case, make

from pacl_kernels import PaclLoss, fused_pacl_loss

SCORE_FORWARD = torch.ops.pacl_kernels.score_forward.default
SCORE_BACKWARD = torch.ops.pacl_kernels.score_backward.default


def operator_arguments(problem, backend):
    """What the operators take before their buffers: the temperature as a tensor, then as a number."""
    inputs = (problem.patches, problem.texts, problem.patch_mask)
    tau = problem.attn_temperature
    return [(*inputs, tau, 1.0, problem.form, backend), (*inputs, None, tau.item(), problem.form, backend)]


@pytest.mark.parametrize("form, mask", [("dot", None), ("cosine", "random"), ("max", "random")])
def test_opcheck(form, mask, target):
    problem = make(Case(3, 5, 9, K=4, mask=mask), form, "compatibility", target.dtype, target.device)
    if mask is not None:  # opcheck compares its inputs before and after without equal_nan
        problem = replace(problem, patches=problem.patches.nan_to_num(0, 0, 0))
    for arguments, skips in zip(operator_arguments(problem, target.backend), ((None, 0, 1, 2), (None,)), strict=True):
        phi, lse = torch.empty_like(problem.upstream), torch.empty_like(problem.upstream)
        torch.library.opcheck(SCORE_FORWARD, (*arguments, phi, lse))
        SCORE_FORWARD(*arguments, phi, lse)
        buffers = (torch.empty_like(problem.patches), torch.empty_like(problem.texts), phi.new_empty(()))
        for skipped in skips:
            grads = [None if i == skipped else buffer for i, buffer in enumerate(buffers)]
            torch.library.opcheck(SCORE_BACKWARD, (*arguments, phi, lse, problem.upstream, *grads))


def _answer(function, problem):
    leaves = {name: getattr(problem, name).detach().clone().requires_grad_() for name in DIFFERENTIABLE}
    value = function(*leaves.values(), problem.patch_mask)
    grads = torch.autograd.grad(value, list(leaves.values()))
    return {"value": value.detach(), **dict(zip(leaves, grads, strict=True))}


def _same(compiled, eager, problem):
    """Same values and gradients as the function without `torch.compile`."""
    expected, sizes = _answer(eager, problem), natural_sizes(problem)
    for name, got in _answer(compiled, problem).items():
        assert got.dtype == expected[name].dtype
        assert_accurate(name, got, expected[name], problem.patches.dtype, natural=sizes[name])


def _function(form, loss, backend):
    def function(patches, texts, scale, bias, tau, mask):
        options = {"patch_mask": mask, "form": form, "loss": loss, "backend": backend}
        return fused_pacl_loss(patches, texts, scale, logit_bias=bias, attn_temperature=tau, **options)

    return function


@pytest.mark.parametrize("form, loss, mask", [("dot", "infonce", None), ("cosine", "sigmoid", "first")])
def test_fullgraph(form, loss, mask, single):
    """Inductor's code, as a user gets it."""
    torch._dynamo.reset()
    function = _function(form, loss, single.backend)
    compiled = torch.compile(function, fullgraph=True)
    _same(compiled, function, make(Case(4, 9, 21, mask=mask), form, loss, single.dtype, single.device))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
@pytest.mark.parametrize("mask", [None, "first"])
def test_fullgraph_traced(form, loss, mask, single):
    """Every option through the same tracing, without the minutes that a compiler takes."""
    _traced(form, loss, mask, single)


@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
def test_fullgraph_traced_in_every_dtype(loss, target):
    _traced("cosine", loss, "first", target)


def _traced(form, loss, mask, target):
    torch._dynamo.reset()
    function = _function(form, loss, target.backend)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    _same(compiled, function, make(Case(4, 9, 21, mask=mask), form, loss, target.dtype, target.device))


@pytest.mark.parametrize("form", FORMS)
def test_dynamic_batch(form, single):
    """One graph for all batches and numbers of patches."""
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    function = _function(form, "infonce", single.backend)
    for backend in (count, "aot_eager"):
        compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
        for b, n in ((4, 9), (7, 5), (2, 33)):
            _same(compiled, function, make(Case(b, n, 21, mask="first"), form, "infonce", device=single.device))
        torch._dynamo.reset()
    assert len(graphs) == 1


def test_numbers_and_module(single):
    """Scalars that are numbers, and the module with its keyword call."""
    torch._dynamo.reset()
    module = PaclLoss(attn_temperature=0.2, form="cosine", backend=single.backend)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    problem = make(Case(4, 9, 21), "cosine", "infonce", device=single.device)
    arguments = {"image_features": problem.patches, "text_features": problem.texts, "logit_scale": 10.0}
    assert_accurate("loss", compiled(**arguments), module(**arguments), torch.float32)
    traced = compiled(**arguments, output_dict=True)["contrastive_loss"]
    assert_accurate("loss", traced, module(**arguments), torch.float32)


def test_compatibility_compiles(single):
    torch._dynamo.reset()
    problem = make(Case(4, 9, 21, K=3), "cosine", "compatibility", device=single.device)
    patches = problem.patches.requires_grad_()
    compiled = torch.compile(
        lambda p: call(replace(problem, patches=p), single.backend), fullgraph=True, backend="aot_eager"
    )
    eager = call(problem, single.backend)
    assert_accurate("phi", compiled(patches), eager, torch.float32)
    traced, expected = (
        torch.autograd.grad((phi * problem.upstream).sum(), patches)[0] for phi in (compiled(patches), eager)
    )
    assert_accurate("patches", traced, expected, torch.float32)
