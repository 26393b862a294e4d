"""Training in many processes, wrapped as users wrap it, takes the same steps as one process with the whole batch."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from gloo_loss import EXCHANGES, local_rows
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from pacl_kernels import cached_step, fused_pacl_loss

WIDTH, D, N, STEPS = 12, 16, 5, 10


class Model(nn.Module):
    """Embed patch tokens and texts, and hold the loss's scalars, of shape `scalar`."""

    def __init__(self, scalar: tuple[int, ...], dropout: float = 0.0):
        super().__init__()
        torch.manual_seed(7)
        self.vision = nn.Sequential(nn.Linear(WIDTH, 20), nn.ReLU(), nn.Dropout(dropout), nn.Linear(20, D))
        self.text = nn.Linear(WIDTH, D)
        self.log_scale = nn.Parameter(torch.full(scalar, 2.0))
        self.bias = nn.Parameter(torch.full(scalar, -1.0))
        self.log_tau = nn.Parameter(torch.full(scalar, -2.0))

    def forward(self, tokens: Tensor, texts: Tensor) -> tuple[Tensor, ...]:
        return self.vision(tokens), self.text(texts), self.log_scale.exp(), self.bias * 1, self.log_tau.exp()


def loss_of(patches, texts, scale, bias, tau, **options) -> Tensor:
    return fused_pacl_loss(patches, texts, scale, logit_bias=bias, attn_temperature=tau, **options)


def batch(size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randn(size, N, WIDTH, generator=generator, dtype=torch.float64)
    return tokens.to(dtype), (tokens[:, 0] + torch.randn(size, WIDTH, generator=generator)).to(dtype)


def wrap(model: nn.Module, how: str, group) -> nn.Module:
    if how == "ddp":
        return DistributedDataParallel(model, process_group=group)
    if not hasattr(torch.cpu.Stream(), "record_event"):
        pytest.skip("this torch's fully_shard fails on a CPU")
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (group.size(),))
    fully_shard(model.vision, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(x: Tensor) -> Tensor:
    """Return the full tensor of one that FSDP shards."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def assert_same(model: nn.Module, expected: nn.Module, what: str, tolerance: float):
    for (name, y), x in zip(expected.named_parameters(), model.parameters(), strict=True):
        x, y = (whole(parameter.grad if what == "grad" else parameter.detach()) for parameter in (x, y))
        error = (x - y).norm() / y.norm().clamp_min(1e-3)
        assert error <= tolerance, f"{what} of {name}: error {error:.3g}, allowed {tolerance}"


@pytest.mark.parametrize("loss, dtype", [("infonce", torch.float64), ("sigmoid", torch.float32)], ids=str)
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_ten_steps(loss, how, exchange, dtype, sizes, group):
    """The first gradients and the parameters after ten steps agree, for equal and unequal local batches."""
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    plain = Model((1,) if how == "fsdp" else ()).to(dtype)
    model = wrap(copy.deepcopy(plain), how, group)
    tokens, texts = batch(sum(sizes), dtype)
    rows = local_rows(sizes, group.rank())
    options = {"loss": loss, "form": "cosine"}
    steppers = [torch.optim.SGD(x.parameters(), lr=0.02) for x in (plain, model)]
    for step in range(STEPS):
        for stepper in steppers:
            stepper.zero_grad()
        expected = loss_of(*plain(tokens, texts), **options)
        value = loss_of(*model(tokens[rows], texts[rows]), **options, group=group, exchange=exchange)
        expected.backward()
        value.backward()
        torch.testing.assert_close(value, expected, rtol=10 * tolerance, atol=0)
        if step == 0:
            first = expected.detach()
            assert_same(model, plain, "grad", tolerance)
        for stepper in steppers:
            stepper.step()
    assert expected < first, "nothing was learned"
    assert_same(model, plain, "data", tolerance)


def test_sharded_scalars_outside_forward(group):
    """Outside its modules FSDP's parameters are DTensors; scalars may be DTensors, embeddings may not."""
    plain = Model((1,)).double()
    model = wrap(copy.deepcopy(plain), "fsdp", group)
    tokens, texts = batch(2 * group.size(), torch.float64)
    rows = local_rows([2] * group.size(), group.rank())
    patches, embedded, *_ = plain(tokens, texts)
    loss_of(patches.detach(), embedded.detach(), plain.log_scale.exp(), plain.bias, plain.log_tau.exp()).backward()
    scalars = model.log_scale.exp(), model.bias, model.log_tau.exp()
    loss_of(patches.detach()[rows], embedded.detach()[rows], *scalars, group=group).backward()
    for name in ("log_scale", "log_tau"):
        torch.testing.assert_close(whole(getattr(model, name).grad), getattr(plain, name).grad, rtol=1e-10, atol=0)
    with pytest.raises(TypeError, match="texts is a DTensor, expected this process's own rows"):
        fused_pacl_loss(patches[rows], model.text.weight, 10.0, group=group)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
@pytest.mark.parametrize("micro_batch", [1, 2, 3, 64])
def test_cached_step(how, micro_batch, group):
    """Micro-batches in many processes, with dropout, give the gradients of a single pass."""
    local, world = 5, group.size()
    dropout = Model((1,) if how == "fsdp" else (), dropout=0.3).double()
    model, expected = (wrap(copy.deepcopy(dropout), how, group) for _ in range(2))
    tokens, texts = batch(local * world, torch.float64)
    rows = local_rows([local] * world, group.rank())
    mine = tokens[rows], texts[rows]
    loss = partial(loss_of, form="cosine", group=group)

    torch.manual_seed(group.rank())
    steps = [expected(*(x[at : at + micro_batch] for x in mine)) for at in range(0, local, micro_batch)]
    patches, embedded = (torch.cat(x) for x in list(zip(*steps, strict=True))[:2])
    one_pass = loss(patches, embedded, *steps[-1][2:])
    one_pass.backward()
    following = torch.rand(1)

    torch.manual_seed(group.rank())
    value = cached_step(lambda part: model(*part), mine, loss, micro_batch=micro_batch, modules=[model])
    assert not value.requires_grad
    torch.testing.assert_close(value, one_pass.detach(), rtol=1e-10, atol=0)
    assert_same(model, expected, "grad", 1e-10)
    assert torch.equal(torch.rand(1), following), "random numbers do not go on where one pass leaves them"


@pytest.mark.parametrize("how", ["ddp", "fsdp", "part"])
def test_cached_step_respects_who_switched_the_exchange_off(how, group):
    """When the caller accumulates over steps, gradients are exchanged only after the exchange is on again."""
    world = group.size()
    model = wrap(Model((1,)).double(), "fsdp" if how == "part" else how, group)
    tokens, texts = batch(4 * world, torch.float64)
    rows = local_rows([4] * world, group.rank())
    mine, loss = (tokens[rows], texts[rows]), partial(loss_of, group=group)

    def step():
        cached_step(lambda part: model(*part), mine, loss, micro_batch=2, modules=[model])

    def exchanged(parameters):
        """Return True after an exchange: DDP has equal gradients in all processes, and every FSDP shard has one."""
        grads = [x.grad for x in parameters]
        if how != "ddp":
            return all(x is not None for x in grads)
        everyone = [None] * world
        torch.distributed.all_gather_object(everyone, grads)
        return all(torch.allclose(x, y) for other in everyone for x, y in zip(other, grads, strict=True))

    embedders = [*model.parameters()]
    if how == "ddp":
        embedders = [*model.module.vision.parameters(), *model.module.text.parameters()]
        with model.no_sync():
            step()
            assert not exchanged(embedders) or world == 1
        step()
    else:
        switched = model.vision if how == "part" else model
        switched.set_requires_gradient_sync(False)
        step()
        assert not any(x.grad is not None for x in switched.parameters())
        if how == "part":  # the other parameters are still exchanged
            assert model.text.weight.grad is not None
        switched.set_requires_gradient_sync(True)
        step()
    assert exchanged(embedders)


def test_cached_step_refuses_a_static_graph(group):
    model = DistributedDataParallel(Model(()), process_group=group, static_graph=True)
    tokens, texts = batch(4, torch.float32)
    for micro_batch in (2, 4):
        with pytest.raises(ValueError, match="modules has a DistributedDataParallel with static_graph=True, expected"):
            cached_step(lambda part: model(*part), (tokens, texts), loss_of, micro_batch=micro_batch, modules=[model])
