"""Skip marks for tests that need a GPU, and a step of the loss on random inputs."""

from __future__ import annotations

import pytest
import torch

from pacl_kernels import available_backends, fused_pacl_loss

_REASONS = available_backends()
ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(_REASONS["triton"] is not None, reason="triton cannot run here"),
]
ON_HOPPER = [
    pytest.mark.gpu,
    pytest.mark.hopper,
    pytest.mark.skipif(_REASONS["cuda"] is not None, reason="backend 'cuda' cannot run here"),
]


def on_gpu(test):
    """Mark a test to run only where Triton has a GPU."""
    return _marked(test, ON_GPU)


def on_hopper(test):
    """Mark a test to run only where the backend "cuda" runs."""
    return _marked(test, ON_HOPPER)


def _marked(test, marks):
    for mark in marks:
        test = mark(test)
    return test


def random_inputs(b, n, d, dtype=torch.bfloat16, seed=0):
    """Return patches `[b, n, d]`, texts `[b, d]`, scale and temperature on the GPU, all requiring gradients."""
    generator = torch.Generator("cuda").manual_seed(seed)
    patches = torch.randn(b, n, d, device="cuda", dtype=dtype, generator=generator).requires_grad_()
    texts = torch.randn(b, d, device="cuda", dtype=dtype, generator=generator).requires_grad_()
    scale, tau = (torch.tensor(x, device="cuda", requires_grad=True) for x in (20.0, 0.07))
    return patches, texts, scale, tau


def step(inputs, form, backend="auto"):
    """Return the loss and the gradient of each input, None for an input without one."""
    patches, texts, scale, tau = inputs
    loss = fused_pacl_loss(patches, texts, scale, attn_temperature=tau, form=form, backend=backend)
    return [loss.detach(), *torch.autograd.grad(loss, inputs, allow_unused=True)]
