"""Tests of `fused_pacl_loss` and `compatibility` under autocast, without gradients, on meta tensors and in training."""

from dataclasses import replace

import pytest
import torch
from accuracy import Spy, assert_accurate, call, check, evaluate, natural_sizes
from problems import FORMS, OBJECTIVES, Case, make
from torch import nn

import pacl_kernels
from pacl_kernels import fused_pacl_loss


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(form, objective, dtype, single):
    """From float32 inputs, operators get patches in the autocast dtype; the loss and gradients are float32."""
    problem = make(Case(9, 17, 40), form, objective, torch.float32, single.device)
    # Autocast rounds only patches and texts, the operands of the product.
    rounded = replace(problem, patches=problem.patches.to(dtype).float(), texts=problem.texts.to(dtype).float())
    truth, plain = (evaluate(rounded.to(wide), "reference") for wide in (torch.float64, torch.float32))
    with torch.autocast(single.device, dtype), Spy() as spy:
        answer = evaluate(problem, single.backend)
    assert {arguments["patches"].dtype for _, arguments in spy.calls if "patches" in arguments} == {dtype}
    assert {arguments["phi"].dtype for _, arguments in spy.calls if "phi" in arguments} <= {torch.float32}
    sizes = natural_sizes(rounded)
    for name, true in truth.items():
        assert answer[name].dtype == torch.float32
        assert_accurate(name, answer[name], true, dtype, plain[name], sizes[name])


def test_autocast_turned_off_inside(single):
    """A region that disables autocast inside an autocast region computes in float32."""
    problem = make(Case(9, 17, 40), "cosine", "infonce", torch.float32, single.device)
    with torch.autocast(single.device, torch.bfloat16), torch.autocast(single.device, enabled=False):
        check(problem, single.backend)


def test_autocast_leaves_float64_alone():
    problem = make(Case(9, 17, 40), "cosine", "infonce", torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        check(problem, "torch")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(form, objective, mode, target):
    problem = make(Case(5, 7, 33), form, objective, target.dtype, target.device)
    expected = evaluate(problem, target.backend)["value"]
    problem.patches.requires_grad_()
    with mode():
        value = call(problem, target.backend)
    assert not value.requires_grad and value.is_inference() == (mode is torch.inference_mode)
    assert torch.equal(value, expected)


def test_value_types(target):
    """The loss is 0-D and φ is [B, K]; both are float32, or float64 for float64 inputs."""
    wide = torch.float64 if target.dtype == torch.float64 else torch.float32
    for objective, shape in (("compatibility", (5, 5)), ("infonce", ()), ("sigmoid", ())):
        value = call(make(Case(), "dot", objective, target.dtype, target.device), target.backend)
        assert (value.shape, value.dtype, value.device.type) == (shape, wide, target.device)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_meta_tensors(backend):
    """Meta tensors give shapes and dtypes without any computation."""
    patches = torch.empty(4, 3, 5, device="meta", requires_grad=True)
    value = fused_pacl_loss(patches, patches[:, 0], 10.0, backend=backend)
    value.backward()
    assert (value.shape, value.dtype, patches.grad.shape) == ((), torch.float32, patches.shape)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_value_types_of_the_reference(objective, monkeypatch):
    """The reference returns float32 for 16 bits and under autocast, and avoids squares that overflow float16."""
    monkeypatch.setenv("PACL_BACKEND", "reference")
    problem = make(Case(5, 7, 33, data="large"), "cosine", objective, torch.float16)
    for inputs, autocast in ((problem, False), (problem.to(torch.float32), True)):
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            value, expected = call(inputs, "auto"), call(inputs, "torch")
        assert value.dtype == torch.float32
        assert_accurate("value", value, expected, torch.float32)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
def test_training_learns(form, loss, single):
    """Some optimiser steps on all learnable inputs halve the loss at least."""
    torch.manual_seed(0)
    images = torch.randn(16, 12, 24, device=single.device)
    words = torch.randn(16, 20, device=single.device)
    embed = nn.Linear(24, 20).to(single.device)
    log_scale, bias, log_tau = (nn.Parameter(torch.tensor(x, device=single.device)) for x in (2.0, -2.0, -1.5))
    optimiser = torch.optim.Adam([*embed.parameters(), log_scale, bias, log_tau], 1e-2)
    history = []
    for _ in range(40):
        optimiser.zero_grad()
        value = fused_pacl_loss(
            embed(images),
            words,
            log_scale.exp(),
            logit_bias=bias,
            attn_temperature=log_tau.exp(),
            form=form,
            loss=loss,
            backend=single.backend,
        )
        value.backward()
        optimiser.step()
        history.append(value.item())
    assert history[-1] < 0.5 * history[0]


def test_public_names():
    assert set(pacl_kernels.__all__) >= {"PaclFunction", "PaclLoss", "compatibility", "fused_pacl_loss"}
    assert all(hasattr(pacl_kernels, name) for name in pacl_kernels.__all__)
    assert issubclass(pacl_kernels.PaclFunction, torch.autograd.Function)
