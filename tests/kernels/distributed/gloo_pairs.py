"""The loss over any pairs, and the scores, of many processes equal those of one process with the whole batch."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from accuracy import assert_accurate, evaluate, natural_sizes
from problems import DIFFERENTIABLE, Case, Problem, make
from torch import Tensor, nn

from pacl_kernels import cached_step, compatibility, fused_pacl_loss

EXCHANGES = ("gather", "ring")
LOSSES = ("infonce", "sigmoid")
IMAGES, TEXTS = (3, 2, 5, 1), (4, 7, 1, 2)  # of each process


def local(counts, group) -> slice:
    return slice(sum(counts[: group.rank()]), sum(counts[: group.rank() + 1]))


def pairs_of(kind: str, b: int, k: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    pairs = {}
    if "ids" in kind:
        pairs |= {
            name: torch.randint(-1, b, (n,), generator=generator) for name, n in (("image_ids", b), ("text_ids", k))
        }
    if "targets" in kind:
        pairs["targets"] = torch.rand(b, k, generator=generator) * (torch.rand(b, k, generator=generator) > 0.6)
    if "bias" in kind:
        bias = torch.randn(b, k, generator=generator) * (900 if "large" in kind else 2)
        bias[torch.rand(b, k, generator=generator) > 0.7] = float("-inf")
        bias[0], bias[:, -1] = float("-inf"), float("-inf")  # an image and a text without a pair
        pairs["pair_bias"] = bias
    return pairs


def answer(problem: Problem, **options) -> dict[str, Tensor]:
    """Return the loss and all gradients."""
    leaves = {name: getattr(problem, name).detach().clone().requires_grad_() for name in DIFFERENTIABLE}
    pairs = {name: x.clone().requires_grad_(name == "pair_bias") for name, x in problem.pairs.items()}
    value = options.pop("function", fused_pacl_loss)(
        *(leaves[name] for name in ("patches", "texts", "logit_scale")),
        **{name: leaves[name] for name in ("logit_bias", "attn_temperature")},
        **pairs, form=problem.form, loss=problem.objective, **options,
    )  # fmt: skip
    leaves |= {name: x for name, x in pairs.items() if x.requires_grad}
    grads = torch.autograd.grad(value, list(leaves.values()))
    return {"value": value.detach(), **dict(zip(leaves, grads, strict=True))}


def local_part(problem: Problem, images: slice, texts: slice) -> Problem:
    pairs = {name: x[texts if name == "text_ids" else images] for name, x in problem.pairs.items()}
    return replace(problem, patches=problem.patches[images], texts=problem.texts[texts], pairs=pairs)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", ["ids", "targets", "bias", "ids-bias", "targets-bias", "ids-large bias"])
def test_equals_one_process(kind, loss, exchange, group):
    dtype = torch.bfloat16 if kind == "ids" else torch.float32
    counts = IMAGES, IMAGES if kind == "bias" else TEXTS
    images, texts = (local(x, group) for x in counts)
    b, k = (sum(x[: group.size()]) for x in counts)
    problem = make(Case(b, 5, 33, K=k), "cosine", loss, dtype)
    problem = replace(problem, pairs=pairs_of(kind, b, k))
    truth, plain = (
        evaluate(problem.to(wide), "reference", (*DIFFERENTIABLE, "pair_bias"))
        for wide in (torch.float64, torch.float32)
    )
    got = answer(local_part(problem, images, texts), group=group, exchange=exchange)
    sizes, world = natural_sizes(problem), group.size()
    places = {"patches": images, "texts": texts, "pair_bias": images}
    for name, x in got.items():
        factor = world if name in places else 1
        part = places.get(name, slice(None))
        true, near = ((y[name][part] if name in places else y[name]) * factor for y in (truth, plain))
        assert_accurate(name, x, true, dtype, near.double(), sizes[name] * factor)


@pytest.mark.parametrize("loss, exchange", [("infonce", "ring"), ("sigmoid", "gather")])  # gloo_loss.py has the others
def test_compiled(loss, exchange, group):
    """`fullgraph=True` works with the same number of texts in every process."""
    world, rank = group.size(), group.rank()
    problem = make(Case(2 * world, 5, 16, K=3 * world), "dot", loss, torch.float32)
    problem = replace(problem, pairs=pairs_of("ids-bias", 2 * world, 3 * world))
    mine = local_part(problem, slice(2 * rank, 2 * rank + 2), slice(3 * rank, 3 * rank + 3))
    torch._dynamo.reset()
    compiled = torch.compile(fused_pacl_loss, fullgraph=True, backend="aot_eager")
    options = {"group": group, "exchange": exchange}
    got, expected = answer(mine, function=compiled, **options), answer(mine, **options)
    for name, x in expected.items():
        torch.testing.assert_close(got[name], x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("even", [False, True], ids=["uneven", "even"])
@pytest.mark.parametrize("form", ["dot", "max"])
def test_scores(form, even, group):
    """`compatibility` gives this process's rows; gradients of texts are summed over processes."""
    counts = (2,) * 4 if even else TEXTS
    images, texts = local(IMAGES, group), local(counts, group)
    b, k = sum(IMAGES[: group.size()]), sum(counts[: group.size()])
    problem = make(Case(b, 5, 33, K=k), form, "compatibility", torch.float64)

    def run(patches, texts, upstream, **options):
        leaves = [x.detach().clone().requires_grad_() for x in (patches, texts)]
        phi = compatibility(*leaves, attn_temperature=0.1, form=form, **options)
        return phi.detach(), *torch.autograd.grad(phi, leaves, upstream)

    phi, grad_patches, grad_texts = run(problem.patches, problem.texts, problem.upstream)
    got = run(problem.patches[images], problem.texts[texts], problem.upstream[images], group=group)
    for x, expected in zip(got, (phi[images], grad_patches[images], grad_texts[texts]), strict=True):
        torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-12)


def test_scores_compiled(group):
    rank, world = group.rank(), group.size()
    problem = make(Case(2 * world, 5, 16, K=3 * world), "dot", "compatibility")
    patches, texts = problem.patches[2 * rank : 2 * rank + 2], problem.texts[3 * rank : 3 * rank + 3]
    texts = texts.clone().requires_grad_()
    compiled = torch.compile(compatibility, fullgraph=True, backend="aot_eager")
    results = []
    for function in (compatibility, compiled):
        phi = function(patches, texts, group=group)
        results.append((phi.detach(), *torch.autograd.grad(phi.square().sum(), texts)))
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y)


def test_own_loss_from_scores(group):
    """A loss built from the scores has, averaged over processes as DDP does, the gradients of the whole batch."""
    torch.manual_seed(0)
    images, texts = (local(IMAGES, group) for _ in "ab")
    b = sum(IMAGES[: group.size()])
    p, t = torch.randn(b, 5, 12, dtype=torch.float64), torch.randn(b, 12, dtype=torch.float64)
    layer = nn.Linear(12, 12, bias=False).double()

    def loss(phi, first, share):
        """Return the part of the rows in the mean over the batch of a margin loss."""
        own = torch.arange(len(phi)) + first
        hinge = (0.2 + phi - phi[torch.arange(len(phi)), own][:, None]).clamp_min(0)
        return hinge.sum() / b * share

    expected = torch.autograd.grad(loss(compatibility(layer(p), layer(t)), 0, 1), layer.weight)[0]
    phi = compatibility(layer(p[images]), layer(t[texts]), group=group)
    grad = torch.autograd.grad(loss(phi, images.start, group.size()), layer.weight)[0]
    dist.all_reduce(grad)
    torch.testing.assert_close(grad / group.size(), expected)


def test_cached_with_several_captions(group):
    """GradCache with two captions of each image and ids equals one process with the whole batch."""
    world = group.size()
    torch.manual_seed(0)
    layer = nn.Linear(8, 8).double()
    images, texts = torch.randn(4 * world, 3, 8).double(), torch.randn(4 * world, 2, 8).double()
    numbers = torch.arange(4 * world)

    def encode(batch):
        images, texts, numbers = batch
        return layer(images), layer(texts.flatten(0, 1)), numbers, numbers.repeat_interleave(2)

    def loss(patches, texts, image_ids, text_ids, **options):
        return fused_pacl_loss(patches, texts, 10.0, image_ids=image_ids, text_ids=text_ids, **options)

    expected = torch.autograd.grad(loss(*encode((images, texts, numbers)), group="local"), list(layer.parameters()))
    mine = slice(4 * group.rank(), 4 * group.rank() + 4)
    batch = images[mine], texts[mine], numbers[mine]
    cached_step(encode, batch, partial(loss, group=group), micro_batch=3)
    for parameter, grad in zip(layer.parameters(), expected, strict=True):
        dist.all_reduce(parameter.grad)
        torch.testing.assert_close(parameter.grad / world, grad)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"image_ids": torch.arange(2)}, "text_ids is None, expected ids like image_ids: with a group ids count in"),
        ({"text_ids": torch.arange(2)}, "image_ids is None, expected ids like text_ids"),
        (
            {"targets": torch.ones(2, 2)},
            r"targets has shape \[2, 2\], expected \[2, \d\], a column for each text of all",
        ),
        ({"pair_bias": torch.ones(3, 2)}, r"pair_bias has shape \[3, 2\], expected \[2, K of all processes\]"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_refuses(given, message, group):
    if group.size() == 1:
        pytest.skip("a group of one process is no group")
    with pytest.raises(ValueError, match=message):
        fused_pacl_loss(torch.randn(2, 3, 4), torch.randn(2, 4), 10.0, **given, group=group)


@pytest.mark.parametrize("kind, other", [("ids", "targets"), ("bias alone", "default"), ("ids", "bias alone")])
def test_processes_must_agree(kind, other, group):
    """Kinds of pairs that need other collectives are an error in every process; none waits for the others."""
    if group.size() == 1:
        pytest.skip("nobody to agree with")
    ids, columns = torch.arange(2), 2 * group.size()
    given = {
        "ids": {"image_ids": ids, "text_ids": ids},
        "targets": {"targets": torch.eye(2, columns)},
        "bias alone": {"pair_bias": torch.zeros(2, columns)},
        "default": {},
    }[kind if group.rank() == 0 else other]
    with pytest.raises(ValueError, match=f"pairs is '{kind}' on rank 0 of the group and '{other}' on rank 1"):
        fused_pacl_loss(torch.randn(2, 3, 4), torch.randn(2, 4), 10.0, **given, group=group)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", ["ids", "targets-bias", ""])
def test_lists_equal_one_process(kind, loss, group):
    """Lists of texts count in the texts of all processes."""
    counts = IMAGES, TEXTS if kind else IMAGES
    images, texts = (local(x, group) for x in counts)
    b, k = (sum(x[: group.size()]) for x in counts)
    index = torch.randint(-1, k, (b, 6), generator=torch.Generator().manual_seed(2))
    index[torch.arange(b), torch.arange(b) % 6] = torch.arange(b) % k
    index[0, 3:] = index[0, :3]
    problem = make(Case(b, 5, 33, K=k), "cosine", loss, torch.float64)
    pairs = {name: x.double() if x.is_floating_point() else x for name, x in pairs_of(kind, b, 6).items()}
    if "text_ids" in pairs:
        pairs["text_ids"] = torch.arange(k) % b
    problem = replace(problem, pairs=pairs | {"text_index": index})
    expected = answer(problem, group="local")
    got = answer(local_part(problem, images, texts), group=group)
    places = {"patches": images, "texts": texts, "pair_bias": images}
    for name, x in got.items():
        true = expected[name][places[name]] * group.size() if name in places else expected[name]
        torch.testing.assert_close(x, true, rtol=1e-9, atol=1e-12)
    if not kind:
        wrong = replace(problem, pairs={"text_index": torch.full_like(index, k)})
        with pytest.raises(ValueError, match=f"text_index has {k}, expected the number of one of the {k} texts"):
            answer(local_part(wrong, images, texts), group=group)
        with pytest.raises(ValueError, match="exchange is 'ring', expected 'gather' or 'auto' with text_index"):
            answer(local_part(problem, images, texts), group=group, exchange="ring")


def test_lists_compiled(group):
    """`fullgraph=True` works with lists."""
    world, rank = group.size(), group.rank()
    problem = make(Case(2 * world, 5, 16, K=2 * world), "dot", "infonce", torch.float32)
    index = torch.arange(2 * world)[:, None] + torch.tensor([0, 1, -1])
    problem = replace(problem, pairs={"text_index": torch.where(index < 2 * world, index, -1)})
    own = local_part(problem, slice(2 * rank, 2 * rank + 2), slice(2 * rank, 2 * rank + 2))
    torch._dynamo.reset()
    compiled = torch.compile(fused_pacl_loss, fullgraph=True, backend="aot_eager")
    got, expected = answer(own, function=compiled, group=group), answer(own, group=group)
    for name, x in expected.items():
        torch.testing.assert_close(got[name], x, rtol=1e-5, atol=1e-6)
