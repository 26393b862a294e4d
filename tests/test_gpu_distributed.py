"""The collectives of a group on a GPU: NCCL with one process, which needs one GPU and still calls every one of them."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from accuracy import assert_accurate, natural_sizes
from problems import DIFFERENTIABLE, Case, make

from pacl_kernels import distributed, fused_pacl_loss
from pacl_kernels.autograd import Options
from pacl_kernels.distributed import global_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (torch.cuda.is_available() and dist.is_nccl_available()), reason="no CUDA device"),
]


@pytest.fixture
def group():
    dist.init_process_group("nccl", rank=0, world_size=1, store=dist.HashStore(), device_id=torch.device("cuda", 0))
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_collectives_of_one_process(exchange, loss, dtype, group):
    """The same numbers as without a group, and no wait for the device after the first step."""
    problem = make(Case(33, 49, 64), "cosine", loss, dtype, "cuda")
    leaves = [{name: getattr(problem, name).detach().clone().requires_grad_() for name in DIFFERENTIABLE} for _ in "ab"]

    def step(x):
        inputs = x["patches"], x["texts"], x["logit_scale"], None, x["attn_temperature"], x["logit_bias"]
        value = global_loss(*inputs, Options("cosine", loss, "triton"), group, exchange)
        return value, torch.autograd.grad(value, list(x.values()))

    x, y = leaves
    step(x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        value, grads = step(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    options = {"logit_bias": y["logit_bias"], "attn_temperature": y["attn_temperature"], "form": "cosine", "loss": loss}
    expected = fused_pacl_loss(y["patches"], y["texts"], y["logit_scale"], **options)
    sizes = natural_sizes(problem)
    assert_accurate("value", value, expected, torch.float32, natural=1.0)
    for name, got, true in zip(y, grads, torch.autograd.grad(expected, list(y.values())), strict=True):
        assert_accurate(name, got, true, got.dtype, natural=sizes[name])


def test_a_larger_batch_has_to_be_agreed_on(group):
    def step(b):
        p, t = torch.randn(b, 5, 16, device="cuda"), torch.randn(b, 16, device="cuda")
        return global_loss(p, t, 10.0, None, 0.1, None, Options("dot", "infonce", "triton"), group, "gather")

    step(8), step(4)
    with pytest.raises(ValueError, match="texts has 9 rows, expected at most 8, the largest local batch of the first"):
        step(9)
    distributed.forget(group)
    assert step(9).isfinite()
