"""The sigmoid loss of many processes with gradients made in the forward: what the tests of all losses do not ask."""

from __future__ import annotations

import pytest
import torch
from gloo_loss import EXCHANGES, Traffic, assert_close, local_part, local_rows
from problems import DIFFERENTIABLE, Case, make

from pacl_kernels import distributed, fused_pacl_loss

SIZES = [3, 5, 1, 4]
NAMES = (*DIFFERENTIABLE, "pair_bias")


@pytest.fixture(params=EXCHANGES)
def step(request, group):
    """Return a function that computes the loss of this process's part, and the leaves that it depends on."""
    sizes, rank, exchange = SIZES[: group.size()], group.rank(), request.param
    problem = local_part(make(Case(sum(sizes), 7, 33), "dot", "sigmoid"), local_rows(sizes, rank))
    leaves = {name: getattr(problem, name).detach().clone().requires_grad_() for name in DIFFERENTIABLE}
    generator = torch.Generator().manual_seed(rank)
    leaves["pair_bias"] = torch.randn(sizes[rank], sum(sizes), generator=generator).requires_grad_()

    def step(**changes):
        return fused_pacl_loss(**(leaves | changes), loss="sigmoid", group=group, exchange=exchange)

    step.ring, step.texts_sent = exchange == "ring", ("all_to_all_single", (max(sizes), 33))
    return step, leaves


def test_gradients_are_made_in_the_forward(step, group):
    """Texts travel once, nothing travels in the backward, and a graph may be used again."""
    step, leaves = step
    with Traffic() as traffic:
        value = step()
    with Traffic() as afterwards:
        once = torch.autograd.grad(value, list(leaves.values()), retain_graph=True)
        twice = torch.autograd.grad(2 * value, list(leaves.values()), retain_graph=True)
    assert all(torch.equal(2 * x, y) for x, y in zip(once, twice, strict=True))
    (grad,) = torch.autograd.grad(value, leaves["patches"], create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        grad.sum().backward()
    with Traffic() as of_frozen:
        frozen = step(texts=leaves["texts"].detach())
    assert torch.equal(torch.autograd.grad(frozen, leaves["patches"])[0], once[0])
    with torch.no_grad():
        torch.testing.assert_close(step(), value.detach())
    world = group.size()
    if world > 1:
        assert not afterwards.sent
        if step.ring:
            assert traffic.sent.count(step.texts_sent) == 2 * world - 1  # their gradient makes a hop more
            assert of_frozen.sent.count(step.texts_sent) == world - 1


def test_padding_and_backends(step, group, monkeypatch):
    """The answer is the same if the numbers of texts are unknown, and if processes compute in different ways."""
    if group.size() == 1:
        pytest.skip("nothing is padded")
    step, leaves = step
    rank = group.rank()
    ids = torch.arange(SIZES[rank]) // 2 + 10 * rank
    kinds = {"pair_bias": None}, {}, {"image_ids": ids, "text_ids": ids}

    def answers():
        for changes in kinds:
            needed = {name: leaves[name] for name in NAMES if name not in changes}
            value = step(**changes)
            grads = torch.autograd.grad(value, list(needed.values()))
            yield {"value": value.detach(), **dict(zip(needed, grads, strict=True))}

    expected = list(answers())
    with monkeypatch.context() as patch:
        patch.setattr("pacl_kernels.distributed.sigmoid.in_one_pass", lambda *_: rank == 0)
        mixed = list(answers())
    monkeypatch.setattr("pacl_kernels.distributed.agreement.may_read", lambda device: False)
    unread = [*answers(), *answers()][3:]  # the first call of each kind still reads
    distributed.forget(group)
    for got in (mixed, unread):
        for x, y in zip(got, expected, strict=True):
            assert_close(x, y, 1e-5, dict.fromkeys(y, 1.0))
