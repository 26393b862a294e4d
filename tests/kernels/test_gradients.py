"""Gradients agree with finite differences, are computed only on request, and can be differentiated only once."""

from dataclasses import replace
from itertools import chain, combinations

import pytest
import torch
from accuracy import Spy, call, check, evaluate
from problems import DIFFERENTIABLE, FORMS, OBJECTIVES, Case, make
from torch.utils.checkpoint import checkpoint


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("mask", [None, "random", "one"])
def test_gradcheck(form, objective, mask):
    """Gradients agree with finite differences; float64 uses the same Function, so they are ours, not autograd's."""
    problem = make(Case(3, 5, 4, tau=0.3, scale=5.0, mask=mask), form, objective, torch.float64)
    names = DIFFERENTIABLE if objective != "compatibility" else ("patches", "texts", "attn_temperature")
    if mask is not None:  # finite differences need finite numbers
        problem = replace(problem, patches=problem.patches.masked_fill(~problem.patch_mask[..., None], 0.5))

    def function(*inputs):
        return call(replace(problem, **dict(zip(names, inputs, strict=True))), "torch")

    inputs = [getattr(problem, name).clone().requires_grad_() for name in names]
    with Spy() as spy:
        assert torch.autograd.gradcheck(function, inputs)
    operators = {"compatibility", "loss"} if objective != "compatibility" else {"compatibility"}
    assert spy.backends() == {(f"{name}_{way}", "torch") for name in operators for way in ("forward", "backward")}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_only_what_is_asked_for(form, objective, single):
    """For every subset of the inputs the operator gets buffers for the requested gradients only (see `evaluate`)."""
    problem = make(Case(4, 9, 21, mask="random"), form, objective, device=single.device)
    for needs in chain.from_iterable(combinations(_taking_part(objective), size) for size in range(6)):
        check(problem, single.backend, needs)
        leaves = {name: getattr(problem, name).clone().requires_grad_(name in needs) for name in DIFFERENTIABLE}
        assert call(replace(problem, **leaves), single.backend).requires_grad == bool(needs)


def _taking_part(objective):
    return DIFFERENTIABLE if objective != "compatibility" else ("patches", "texts", "attn_temperature")


@pytest.mark.sampled(2)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_scalars_of_any_kind(form, objective, target):
    """A scalar is a number, or a float32 or float64 tensor of shape [], [1] or [1, 1, 1]; the bias may be missing."""
    problem = make(Case(4, 9, 21), form, objective, target.dtype, target.device)
    names = ("logit_scale", "logit_bias", "attn_temperature")
    tensors = {name: getattr(problem, name) for name in names}
    expected = check(problem, target.backend)
    for dtype in (torch.float32, torch.float64):
        for shape in ((), (1,), (1, 1, 1)):
            changed = {name: x.to(dtype).reshape(shape) for name, x in tensors.items()}
            answer = check(replace(problem, **changed), target.backend)
            assert answer["value"].shape == expected["value"].shape
            assert answer["attn_temperature"].shape == shape and answer["attn_temperature"].dtype == dtype
    numbers = {name: x.item() for name, x in tensors.items()}
    answer = check(replace(problem, **numbers), target.backend)
    assert all(answer[name] is None for name in names if name in answer)
    for name in names:  # one scalar is a number, the others are tensors
        answer = check(replace(problem, **{name: numbers[name]}), target.backend)
        assert answer.get(name) is None
    assert check(replace(problem, logit_bias=None), target.backend).get("logit_bias") is None


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("factor_needs_gradient", [True, False])
def test_second_derivative_is_refused(form, objective, factor_needs_gradient, single):
    """A gradient penalty raises an error, so that its gradient never silently counts as 0."""
    problem = make(Case(3, 5, 4), form, objective, device=single.device)
    patches = problem.patches.requires_grad_()
    factor = torch.tensor(2.0, device=single.device, requires_grad=factor_needs_gradient)
    value = factor * call(problem, single.backend).sum()
    (grad,) = torch.autograd.grad(value, patches, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|twice|second derivative"):
        (value + grad.square().sum()).backward()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_backward_twice(form, objective, single):
    """With the graph retained, a second backward gives the same bits: the first changes no saved tensor."""
    problem = make(Case(9, 7, 33), form, objective, device=single.device)
    leaves = [getattr(problem, name).requires_grad_() for name in _taking_part(objective)]
    value = call(problem, single.backend).sum()
    first = torch.autograd.grad(value, leaves, retain_graph=True)
    second = torch.autograd.grad(value, leaves)
    for name, one, two in zip(_taking_part(objective), first, second, strict=True):
        assert torch.equal(one, two), name
        assert one.data_ptr() != two.data_ptr(), name


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("create_graph", [False, True])
def test_checkpoint(objective, create_graph, single):
    """A checkpoint, which repeats the forward and returns each saved tensor only once, gives the same bits."""
    problem = make(Case(5, 7, 33), "dot", objective, device=single.device)
    leaves = [getattr(problem, name).requires_grad_() for name in _taking_part(objective)]
    value = checkpoint(call, problem, single.backend, use_reentrant=False).sum()
    got = torch.autograd.grad(value, leaves, create_graph=create_graph)
    expected = torch.autograd.grad(call(problem, single.backend).sum(), leaves)
    for name, one, two in zip(_taking_part(objective), got, expected, strict=True):
        assert torch.equal(one, two), name


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_incoming_gradient(objective, target):
    """Gradients are linear in the incoming gradient, which may be zero, negative, large, expanded or strided."""
    problem = make(Case(5, 7, 33), "dot", objective, target.dtype, target.device)
    if objective == "compatibility":
        ones = torch.ones((), dtype=problem.upstream.dtype, device=target.device)
        for upstream in (ones.expand(5, 5), problem.upstream.T, 0 * problem.upstream, problem.upstream.tril()):
            check(replace(problem, upstream=upstream), target.backend)
    else:
        for factor in (0.0, -3.0, 1e-4, 256.0):
            check(replace(problem, upstream=factor), target.backend)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("data, tau", [("small", 0.01), ("large", 0.01), ("norms", 0.05)])
def test_float16_under_a_gradient_scaler(form, data, tau, target):
    """Gradients stay finite even if intermediate values leave the range of float16 at either end."""
    problem = make(Case(9, 7, 33, tau=tau, scale=100.0, data=data), form, "infonce", target.dtype, target.device)
    for exponent in (-12, 0, 12):
        truth = evaluate(replace(problem, upstream=2.0**exponent).to(torch.float64), "reference")
        largest = max(truth[name].abs().max().item() for name in ("patches", "texts"))
        if largest < torch.finfo(target.dtype).max / 2:
            answer = evaluate(replace(problem, upstream=2.0**exponent), target.backend)
            assert all(answer[name].isfinite().all() for name in DIFFERENTIABLE)


def test_changing_an_input_before_backward_is_an_error(single):
    patches = torch.randn(4, 3, 5, device=single.device, requires_grad=True)
    texts = torch.randn(4, 5, device=single.device)
    problem = replace(make(Case(4, 3, 5), "dot", "infonce", device=single.device), patches=patches, texts=texts)
    value = call(problem, single.backend)
    texts.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


class Nothing(torch.autograd.Function):
    """Pass a value forward, and no gradient backward."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_incoming_gradient(objective, single):
    """Without an incoming gradient the inputs get none, as with PyTorch's own operations."""
    problem = make(Case(3, 5, 4), "dot", objective, device=single.device)
    patches, other = problem.patches.requires_grad_(), torch.ones((), device=single.device, requires_grad=True)
    (Nothing.apply(call(problem, single.backend)).sum() + other).backward()
    assert patches.grad is None and other.grad == 1
