"""Run the files `gloo_*.py` in many processes, let one process fail, and run one process with NCCL."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from functools import partial
from pathlib import Path

import pytest
import ranks
import torch
import torch.distributed as dist
from accuracy import assert_accurate, natural_sizes
from forks import fork, status
from problems import DIFFERENTIABLE, Case, make
from ranks import TORCHRUN, forked

from pacl_kernels import distributed, fused_pacl_loss
from pacl_kernels.autograd import Options
from pacl_kernels.checks import Inputs
from pacl_kernels.distributed import global_loss

if not dist.is_available():
    pytest.skip("torch was built without torch.distributed", allow_module_level=True)

FOLDER = Path(__file__).parent


def in_processes(world: int, *command: str) -> str:
    """Run a command in `world` processes, assert that none fails, and return their output.

    Two processes are started by torchrun itself, any other number by its faster replacement.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    modules = "torch.distributed.fsdp", "torch._dynamo", "pacl_kernels", "pytest"
    launcher = TORCHRUN if world == 2 else forked(*modules)
    command = [*launcher, str(world), *command]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, f"{run.stdout[-6000:]}\n{run.stderr[-3000:]}"
    return run.stdout


# Run all tests in three processes, where each has two others; in other numbers, only tests that depend on the number.
# A few of the cases are enough, unless the long tests are asked for.
@pytest.mark.parametrize(
    "world, sample, chosen",
    [
        pytest.param(1, 1, "one", marks=pytest.mark.long),
        (2, 6, "equals and float64 or ten_steps or cached or travel"),
        (3, 6, ""),
        pytest.param(3, 1, "", marks=pytest.mark.long),
        pytest.param(4, 3, "equals and infonce and float64 and dot or travel", marks=pytest.mark.long),
    ],
)
def test_in_processes(world, sample, chosen):
    files = [str(path) for path in sorted(FOLDER.glob("gloo_*.py"))]
    options = "-x", "-q", "-p", "no:cacheprovider", "--sample", str(sample), "-k", chosen
    output = in_processes(world, "-m", "pytest", *options, *files)
    assert output.count(" passed") == world


@pytest.mark.parametrize("exchange", ["gather", "ring"])
@pytest.mark.parametrize("how", ["dies", "sleeps"])
def test_a_process_that_fails_is_an_error_in_the_others(how, exchange, tmp_path):
    """When a process dies or sleeps, the others raise an error after about the group's timeout (4 s); none hangs."""
    words = [str(FOLDER / "one_fails.py"), how, exchange, str(tmp_path / "meeting")]
    outputs = [tmp_path / f"output{rank}" for rank in range(3)]
    processes = [fork(partial(ranks.run, [*words, str(rank)]), output) for rank, output in enumerate(outputs)]
    ended = [status(process) for process in processes[:2]]
    os.killpg(processes[2], signal.SIGKILL)
    status(processes[2])
    for code, output in zip(ended, outputs, strict=False):
        printed = output.read_text()
        assert code == 3 and "finished" not in printed
        assert int(re.search(r"Error after (\d+) s", printed)[1]) <= 10


@pytest.fixture
def nccl():
    """Return a group of this process alone, whose collectives run on the GPU."""
    dist.init_process_group("nccl", rank=0, world_size=1, store=dist.HashStore(), device_id=torch.device("cuda", 0))
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.skipif(not (torch.cuda.is_available() and dist.is_nccl_available()), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_collectives_of_one_process(exchange, loss, dtype, nccl):
    """The loss and gradients equal those without a group, and later steps never wait for the device."""
    problem = make(Case(33, 49, 64), "cosine", loss, dtype, "cuda")
    leaves = [{name: getattr(problem, name).detach().clone().requires_grad_() for name in DIFFERENTIABLE} for _ in "ab"]

    def step(x):
        inputs = Inputs(x["patches"], x["texts"], None, x["attn_temperature"])
        options = Options("cosine", loss, "triton")
        value = global_loss(inputs, x["logit_scale"], x["logit_bias"], options, nccl, exchange)
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


@pytest.mark.gpu
@pytest.mark.skipif(not (torch.cuda.is_available() and dist.is_nccl_available()), reason="no CUDA device")
def test_a_larger_batch_has_to_be_agreed_on(nccl):
    def step(b):
        p, t = torch.randn(b, 5, 16, device="cuda"), torch.randn(b, 16, device="cuda")
        return global_loss(Inputs(p, t, None, 0.1), 10.0, None, Options("dot", "infonce", "triton"), nccl, "gather")

    step(8), step(4)
    with pytest.raises(ValueError, match="texts has 9 rows, expected at most 8, the largest local batch of the first"):
        step(9)
    distributed.forget(nccl)
    assert step(9).isfinite()
