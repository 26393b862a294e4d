"""The loss over any pairs: ids, targets and a bias of each pair, alone and together, on every backend."""

import contextlib
import random
from dataclasses import replace
from itertools import product

import pytest
import torch
from accuracy import check, evaluate
from problems import DIFFERENTIABLE, FORMS, Case, Problem, make

from pacl_kernels import PaclLoss, compatibility, fused_pacl_loss, pairs

NEEDS = (*DIFFERENTIABLE, "pair_bias")
LOSSES = ("infonce", "sigmoid")
INF = float("inf")


def several_positives(b, k, draw):
    """Make captions that share images, and images and texts that belong to nothing."""
    return {"image_ids": draw.randint(-2, b, b), "text_ids": draw.randint(-2, b, k)}


def captions(b, k, draw):
    """Give each image some of the texts, and leave the images their own numbers."""
    return {"text_ids": draw.randint(-1, b, k)}


def soft_targets(b, k, draw):
    targets = draw.rand(b, k) * (draw.rand(b, k) > 0.6)
    targets[b // 2], targets[:, k // 2] = 0, 0  # an image and a text without a positive
    return {"targets": targets}


def biased(b, k, draw):
    bias = 2 * draw.randn(b, k)
    bias[draw.rand(b, k) > 0.7] = -INF  # some positives among them
    bias[b // 3], bias[:, k // 3] = -INF, -INF  # an image and a text without any pair
    return {"pair_bias": bias}


def no_positive(b, k, draw):
    return {"text_ids": torch.full((k,), -1)}


KINDS = {
    "several": several_positives,
    "captions": captions,
    "soft": soft_targets,
    "bias": biased,
    "none": no_positive,
    "several-bias": lambda *a: several_positives(*a) | biased(*a),
    "soft-bias": lambda *a: soft_targets(*a) | biased(*a),
}


class Draw:
    """Draw tensors from a seeded generator."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def randint(self, low, high, count):
        return torch.randint(low, high, (count,), generator=self.generator)

    def rand(self, *shape):
        return torch.rand(*shape, generator=self.generator, dtype=torch.float64)

    def randn(self, *shape):
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)


def with_pairs(problem: Problem, kind: str, seed: int = 0) -> Problem:
    """Return the problem with the pairs of `kind`, on its device and in the dtype of its φ."""
    wide = torch.promote_types(problem.patches.dtype, torch.float32)
    given = KINDS[kind](len(problem.patches), len(problem.texts), Draw(seed))
    given = {name: x.to(problem.patches.device) for name, x in given.items()}
    return replace(problem, pairs={name: x.to(wide) if x.is_floating_point() else x for name, x in given.items()})


SIZES = [(5, 7, 33, 9), (1, 3, 5, 4), (13, 4, 17, 2), (6, 1, 8, 6), (3, 50, 65, 31)]
TEMPERATURES = [dict(tau=0.05, scale=100.0), dict(tau=1.0, scale=1.0), dict(tau=0.1, scale=14.0, mask="random")]
SAMPLE = random.Random(26).sample(list(product(SIZES, TEMPERATURES, FORMS, LOSSES, KINDS)), 48)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("sizes, options, form, loss, kind", SAMPLE)
def test_against_the_reference(sizes, options, form, loss, kind, target):
    b, n, d, k = sizes
    case = Case(b, n, d, K=b if kind == "bias" else k, **options)
    problem = with_pairs(make(case, form, loss, target.dtype, target.device), kind)
    check(problem, target.backend, NEEDS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", LOSSES)
def test_the_reference_against_a_plain_sum(kind, loss):
    """The reference equals a loop over the pairs, which shares nothing with it."""
    problem = with_pairs(make(Case(6, 3, 8, K=6, scale=3.0), "dot", loss, torch.float64), kind, seed=3)
    phi = compatibility(problem.patches, problem.texts, attn_temperature=problem.attn_temperature)
    z = 3.0 * phi + problem.logit_bias + problem.pairs.get("pair_bias", 0.0)
    b, k = z.shape

    def target(i, j):
        if z[i, j] == -INF:
            return 0.0
        if "targets" in problem.pairs:
            return float(problem.pairs["targets"][i, j])
        image, text = (int(ids[x]) for ids, x in zip(ids_of(problem), (i, j), strict=True))
        return float(image == text and image >= 0)

    if loss == "sigmoid":
        expected = -sum(
            target(i, j) * torch.log(torch.sigmoid(z[i, j])) + (1 - target(i, j)) * torch.log(torch.sigmoid(-z[i, j]))
            for i in range(b)
            for j in range(k)
            if z[i, j] > -INF
        )
        expected = expected / b
    else:
        lines = [[(i, j) for j in range(k)] for i in range(b)], [[(i, j) for i in range(b)] for j in range(k)]
        expected = 0.0
        for direction in lines:
            entropies = []
            for line in direction:
                weight = sum(target(*pair) for pair in line)
                if weight > 0:
                    exponentials = sum(torch.exp(z[pair]) for pair in line)
                    positive = sum(target(*pair) * z[pair] for pair in line if target(*pair) > 0) / weight
                    entropies.append(torch.log(exponentials) - positive)
            expected = expected + sum(entropies) / max(1, len(entropies)) / 2
    torch.testing.assert_close(evaluate(problem, "reference", NEEDS)["value"], torch.as_tensor(expected).double())


def ids_of(problem):
    given = problem.pairs
    images = given.get("image_ids", torch.arange(len(problem.patches)))
    return images, given.get("text_ids", images)


@pytest.mark.sampled(7)
@pytest.mark.parametrize(
    "kind, loss, autocast",  # every pair of values; one case compiles for half a second
    [
        ("several", "infonce", False),
        ("several", "sigmoid", True),
        ("soft-bias", "infonce", True),
        ("soft-bias", "sigmoid", False),
        ("none", "infonce", False),
        ("none", "sigmoid", True),
    ],
    ids=lambda x: {False: "plain", True: "autocast"}.get(x, x),
)
def test_compiled(kind, loss, autocast, single):
    """`torch.compile(fullgraph=True)` gives the same answer, under autocast too."""
    problem = with_pairs(make(Case(5, 7, 33, K=9), "cosine", loss, torch.float32, single.device), kind)

    def step(function):
        leaves = {name: getattr(problem, name).detach().clone().requires_grad_() for name in DIFFERENTIABLE}
        given = {name: x.clone().requires_grad_(name == "pair_bias") for name, x in problem.pairs.items()}
        context = torch.autocast(single.device, torch.bfloat16) if autocast else contextlib.nullcontext()
        with context:
            value = function(
                *(leaves[name] for name in ("patches", "texts", "logit_scale")),
                **{name: leaves[name] for name in ("logit_bias", "attn_temperature")},
                **given, form="cosine", loss=loss, backend=single.backend,
            )  # fmt: skip
        asked = [*leaves.values(), *(x for x in given.values() if x.requires_grad)]
        return value, *torch.autograd.grad(value, asked)

    torch._dynamo.reset()  # else the other cases count as recompilations of this function
    compiled = torch.compile(fused_pacl_loss, fullgraph=True, backend="aot_eager")
    for got, expected in zip(step(compiled), step(fused_pacl_loss), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_diagonal_in_other_words(loss, single):
    """Explicit ids, int32 ids, and an identity of targets agree with the default call to rounding."""
    problem = make(Case(17, 5, 40), "dot", loss, torch.float32, single.device)
    expected = evaluate(problem, single.backend)
    numbers = 7 + 3 * torch.randperm(17)
    for given in (
        {"image_ids": numbers, "text_ids": numbers},
        {"image_ids": numbers.int()},
        {"text_ids": torch.arange(17)},
        {"targets": torch.eye(17)},
        {"pair_bias": torch.zeros(17, 17)},
    ):
        given = {name: x.to(single.device) for name, x in given.items()}
        answer = evaluate(replace(problem, pairs=given), single.backend)
        for name, x in expected.items():
            torch.testing.assert_close(answer[name], x, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["several", "soft-bias"])
@pytest.mark.parametrize("loss", LOSSES)
def test_order_does_not_matter(kind, loss):
    """Permuted images and texts have permuted gradients."""
    problem = with_pairs(make(Case(7, 3, 12, K=11), "dot", loss, torch.float64), kind)
    images, texts = (torch.randperm(n, generator=torch.Generator().manual_seed(1)) for n in (7, 11))
    places = {"image_ids": images, "text_ids": texts}
    given = {name: x[places[name]] if name in places else x[images][:, texts] for name, x in problem.pairs.items()}
    moved = replace(problem, patches=problem.patches[images], texts=problem.texts[texts], pairs=given)
    expected, answer = (evaluate(x, "torch", NEEDS) for x in (problem, moved))
    expected["patches"], expected["texts"] = expected["patches"][images], expected["texts"][texts]
    if "pair_bias" in expected:
        expected["pair_bias"] = expected["pair_bias"][images][:, texts]
    for name, x in expected.items():
        torch.testing.assert_close(answer[name], x, rtol=1e-9, atol=1e-12)


def test_an_extra_negative_is_a_text_of_no_image():
    """Texts with negative ids enter the rows' sums and no mean: the same as logits that cross-entropy gets beside."""
    torch.manual_seed(0)
    p, t, extra = torch.randn(5, 3, 8).double(), torch.randn(5, 8).double(), torch.randn(4, 8).double()
    z = 10 * compatibility(p, torch.cat((t, extra)))
    target = torch.arange(5)
    entropy = torch.nn.functional.cross_entropy
    expected = (entropy(z, target) + entropy(z[:, :5].T, target)) / 2
    ids = torch.tensor([0, 1, 2, 3, 4, -1, -7, -1, -1])
    torch.testing.assert_close(fused_pacl_loss(p, torch.cat((t, extra)), 10.0, text_ids=ids), expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_one_patch_is_open_clips_loss(loss):
    """With one patch per image, the loss is that of open_clip on normalised features, also through PaclLoss."""
    open_clip_loss = pytest.importorskip("open_clip.loss")
    torch.manual_seed(0)
    image, text = (torch.nn.functional.normalize(torch.randn(9, 16), dim=-1) for _ in range(2))
    scale, bias = torch.tensor(10.0), torch.tensor(-10.0)
    if loss == "infonce":
        expected, given = open_clip_loss.ClipLoss()(image, text, scale), {}
    else:
        expected, given = open_clip_loss.SigLipLoss()(image, text, scale, bias), {"logit_bias": bias}
    value = PaclLoss(loss=loss)(image[:, None], text, scale, **given, text_ids=torch.arange(9))
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("kind", ["several-bias", "soft"])
@pytest.mark.parametrize("loss", LOSSES)
def test_blocks_of_rows(kind, loss, monkeypatch):
    """The rows are taken in blocks of bounded size, which change nothing but the rounding."""
    problem = with_pairs(make(Case(23, 3, 12, K=14), "dot", loss, torch.float64), kind)
    expected = evaluate(problem, "torch", NEEDS)
    monkeypatch.setattr(pairs, "ROW_BYTES", 5 * 14 * 8)
    for name, x in evaluate(problem, "torch", NEEDS).items():
        torch.testing.assert_close(x, expected[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_any_number_of_threads(loss, cpu_backend):
    """PyTorch splits sums of more than 32,768 numbers among its threads; the loss has the same bits all the same."""
    problem = with_pairs(make(Case(211, 3, 17, K=230), "dot", loss), "several-bias")
    before = torch.get_num_threads()
    answers = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        answers.append(evaluate(problem, cpu_backend, NEEDS))
    torch.set_num_threads(before)
    for name, x in answers[0].items():
        assert all(torch.equal(x, other[name]) for other in answers), name


def test_second_derivatives_are_refused():
    p, t = torch.randn(3, 2, 4, requires_grad=True), torch.randn(5, 4)
    value = fused_pacl_loss(p, t, 10.0, text_ids=torch.tensor([0, 0, 1, 2, -1]))
    (grad,) = torch.autograd.grad(value, p, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        grad.sum().backward()


def test_torch_func():
    p, t, ids = torch.randn(2, 3, 2, 4), torch.randn(2, 5, 4), torch.tensor([0, 0, 1, 2, -1])

    def loss(p, t):
        return fused_pacl_loss(p, t, 10.0, text_ids=ids)

    expected = torch.stack([loss(*x) for x in zip(p, t, strict=True)])
    torch.testing.assert_close(torch.func.vmap(loss)(p, t), expected)
    value = p[0].clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(value, t[0]), value)
    torch.testing.assert_close(torch.func.grad(loss)(p[0], t[0]), grad)


def inputs(**changes):
    return {"patches": torch.randn(4, 3, 5), "texts": torch.randn(6, 5), "logit_scale": 10.0} | changes


IDS = torch.arange(6)


@pytest.mark.parametrize(
    "given, error, message",
    [
        ({}, ValueError, "texts has 6 rows, expected one for each of the 4 images of patches, or text_ids or targets"),
        ({"image_ids": torch.arange(4)}, ValueError, "texts has 6 rows, expected one for each of the 4 images"),
        ({"pair_bias": torch.zeros(4, 6)}, ValueError, "texts has 6 rows, expected one for each of the 4 images"),
        ({"text_ids": list(range(6))}, TypeError, r"text_ids is a list, expected an int64 tensor of shape \[6\]"),
        ({"text_ids": IDS[:5]}, ValueError, r"text_ids has shape \[5\], expected \[6\], one id for each of the texts"),
        ({"text_ids": IDS[:, None]}, ValueError, r"text_ids has shape \[6, 1\], expected \[6\]"),
        ({"text_ids": IDS.float()}, TypeError, "text_ids is torch.float32, expected torch.int64 or torch.int32"),
        ({"text_ids": IDS.to("meta")}, ValueError, "text_ids is on meta, expected cpu like patches"),
        ({"text_ids": IDS, "image_ids": IDS}, ValueError, r"image_ids has shape \[6\], expected \[4\]"),
        ({"text_ids": IDS, "targets": torch.ones(4, 6)}, ValueError, "targets and text_ids are both given"),
        ({"targets": torch.ones(4, 5)}, ValueError, r"targets has shape \[4, 5\], expected \[4, 6\]"),
        ({"targets": torch.ones(6, 4).bool()}, TypeError, "targets is torch.bool, expected torch.float32"),
        ({"targets": torch.ones(4, 6).bfloat16()}, TypeError, "targets is torch.bfloat16, expected torch.float32"),
        ({"targets": torch.full((4, 6), -0.5)}, ValueError, "targets has -0.5, expected finite numbers at least 0"),
        ({"targets": torch.full((4, 6), INF)}, ValueError, "targets has inf, expected finite numbers at least 0"),
        (
            {"targets": torch.full((4, 6), 2.0), "loss": "sigmoid"},
            ValueError,
            r"targets has 2.0, expected .* in \[0, 1\]",
        ),
        ({"targets": torch.ones(4, 6, requires_grad=True)}, ValueError, "targets requires a gradient, expected const"),
        ({"text_ids": IDS, "pair_bias": torch.zeros(4)}, ValueError, r"pair_bias has shape \[4\], expected \[4, 6\]"),
        ({"text_ids": IDS, "pair_bias": 1.0}, TypeError, "pair_bias is a float, expected a tensor of shape"),
        ({"text_ids": IDS, "pair_bias": torch.full((4, 6), INF)}, ValueError, "pair_bias has inf or NaN, expected"),
        ({"text_ids": IDS, "pair_bias": torch.full((4, 6), float("nan"))}, ValueError, "pair_bias has inf or NaN"),
        ({"texts": torch.ones(0, 5), "text_ids": IDS[:0]}, ValueError, r"texts has shape \[0, 5\], expected \[K, D\]"),
    ],
)
@pytest.mark.parametrize("call", ["function", "module"])
def test_refuses(given, error, message, call):
    arguments = inputs(**given)
    with pytest.raises(error, match=message):
        if call == "function":
            fused_pacl_loss(**arguments)
        else:
            module = PaclLoss(loss=arguments.pop("loss", "infonce"))
            module(arguments.pop("patches"), arguments.pop("texts"), **arguments)
