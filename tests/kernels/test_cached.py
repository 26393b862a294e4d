"""`cached_step` gives the gradients of a single pass, for any micro-batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pacl_kernels import cached_step, fused_pacl_loss


class Encoder(nn.Module):
    def __init__(self, frozen_texts: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.vision = nn.Sequential(nn.Linear(6, 9), nn.Dropout(0.5), nn.GELU(), nn.Linear(9, 8))
        self.text = nn.Linear(6, 8).requires_grad_(not frozen_texts)
        self.log_scale = nn.Parameter(torch.tensor(2.0))
        self.rows = []

    def forward(self, batch):
        self.rows.append((len(batch["tokens"]), torch.is_grad_enabled()))
        return self.vision(batch["tokens"]), self.text(batch["texts"]), self.log_scale.exp()


def grads(model: nn.Module) -> dict[str, torch.Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def batch_of(size: int, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(size, 5, 6, generator=generator, dtype=torch.float64).to(dtype)
    return {"tokens": tokens, "texts": tokens.mean(1), "name": "kept"}


def parts_of(batch: dict, size: int) -> list[dict]:
    starts = range(0, len(batch["texts"]), size)
    return [{k: v if isinstance(v, str) else v[at : at + size] for k, v in batch.items()} for at in starts]


def one_pass(model, batch, loss, micro_batch):
    outputs = [model(part) for part in parts_of(batch, micro_batch)]
    patches, texts, scales = zip(*outputs, strict=True)
    value = loss(torch.cat(patches), torch.cat(texts), scales[-1])
    value.backward()
    return value.detach()


@pytest.mark.parametrize("frozen_texts", [False, True])
@pytest.mark.parametrize("micro_batch", [1, 3, 4, 7, 100])
def test_equals_one_pass(micro_batch, frozen_texts):
    batch, loss = batch_of(7), fused_pacl_loss
    model, expected = Encoder(frozen_texts).double(), Encoder(frozen_texts).double()
    for _ in range(2):  # the second round adds to the gradients of the first
        torch.manual_seed(5)
        truth = one_pass(expected, batch, loss, micro_batch)
        state = torch.get_rng_state()
        torch.manual_seed(5)
        value = cached_step(model, batch, loss, micro_batch=micro_batch)
        assert torch.equal(torch.get_rng_state(), state)
        torch.testing.assert_close(value, truth, rtol=1e-12, atol=0)
    for name, grad in grads(expected).items():
        torch.testing.assert_close(grads(model)[name], grad, rtol=1e-10, atol=1e-14)
    parts = len(parts_of(batch, micro_batch))
    assert len(model.rows) == 2 * (2 * parts - 1), "the last part is encoded once, the others twice"
    assert sum(with_graph for _, with_graph in model.rows) == 2 * parts
    assert max(rows for rows, _ in model.rows) == min(micro_batch, 7)


def test_autocast():
    """Gradients are right although autocast caches cast weights, whose graph is missing or already used."""
    batch, expected, model = batch_of(6, torch.float32), Encoder(), Encoder()
    for function in (lambda: one_pass(expected, batch, fused_pacl_loss, 2), lambda: step(model, batch)):
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16):
            function()
    for name, grad in grads(expected).items():
        assert (grads(model)[name] - grad).norm() <= 2e-2 * grad.norm(), name


def step(model, batch):
    return cached_step(model, batch, fused_pacl_loss, micro_batch=2)


def test_the_loss_may_have_parameters_of_its_own():
    tau = nn.Parameter(torch.tensor(0.2, dtype=torch.float64))
    batch, model, expected = batch_of(4), Encoder().double().eval(), Encoder().double().eval()

    def loss(patches, texts, scale):
        return fused_pacl_loss(patches, texts, scale, attn_temperature=tau)

    one_pass(expected, batch, loss, 4)
    truth, tau.grad = tau.grad, None
    cached_step(model, batch, loss, micro_batch=3)
    torch.testing.assert_close(tau.grad, truth, rtol=1e-10, atol=0)


def test_outputs_that_keep_their_graph():
    """If an encoder returns its input, or enables gradients, the graph of the first pass is still not used."""
    batch = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    factor = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def encode(part):
        with torch.enable_grad():
            return part, part * factor

    def loss(one, two):
        return (one * two).sum()

    expected = torch.autograd.grad(loss(*encode(batch)), (batch, factor))
    cached_step(encode, batch, loss, micro_batch=2)
    for got, truth in zip((batch.grad, factor.grad), expected, strict=True):
        torch.testing.assert_close(got, truth)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"micro_batch": 0}, ValueError, "micro_batch is 0, expected at least 1"),
        ({"micro_batch": 2.0}, TypeError, "micro_batch is a float, expected an int"),
        ({"micro_batch": True}, TypeError, "micro_batch is a bool, expected an int"),
        ({"batch": {"tokens": torch.ones(3, 2, 6), "texts": torch.ones(2, 6)}}, ValueError, r"\[2, 3\] rows, expected"),
        ({"batch": {"tokens": torch.ones(0, 2, 6), "texts": torch.ones(0, 6)}}, ValueError, r"\[0\] rows, expected"),
        ({"batch": "no tensor"}, ValueError, r"batch has tensors of \[\] rows"),
        ({"encode": lambda batch: "text"}, TypeError, "encode returned a str, expected a tensor"),
        (
            {"encode": lambda batch: torch.ones(3)},
            ValueError,
            r"encode returned torch.float32 of shape \[3\], expected rows \[rows, D\], integers",
        ),
        ({"encode": lambda batch: ()}, ValueError, "encode returned no tensor, expected at least one"),
        ({"modules": [nn.Linear(2, 2)]}, TypeError, "modules has a Linear, expected a module under Distributed"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_refuses(changes, error, message):
    arguments = {"encode": Encoder(), "batch": batch_of(4, torch.float32), "loss": fused_pacl_loss, "micro_batch": 2}
    with pytest.raises(error, match=message):
        cached_step(**(arguments | changes))


@pytest.mark.parametrize("micro_batch", [1, 2, 5])
def test_any_number_of_rows_and_integers(micro_batch):
    """Parts may return several texts for each image, and ids; the loss gets the rows of all parts in order."""
    torch.manual_seed(0)
    images, texts = torch.randn(5, 3, 8, dtype=torch.float64), torch.randn(5, 4, 8, dtype=torch.float64)
    counts = torch.tensor([2, 0, 4, 1, 3])  # texts of each image
    layer = nn.Linear(8, 8).double()

    def encode(batch):
        images, texts, counts, numbers = batch
        chosen = torch.arange(4) < counts[:, None]
        return layer(images), layer(texts[chosen]), numbers, numbers.repeat_interleave(counts)

    def loss(patches, texts, image_ids, text_ids):
        return fused_pacl_loss(patches, texts, 10.0, image_ids=image_ids, text_ids=text_ids)

    batch = images, texts, counts, torch.tensor([3, 1, 4, 9, 5])
    expected = loss(*encode(batch))
    grads = torch.autograd.grad(expected, list(layer.parameters()))
    value = cached_step(encode, batch, loss, micro_batch=micro_batch)
    torch.testing.assert_close(value, expected.detach())
    for parameter, grad in zip(layer.parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad)
