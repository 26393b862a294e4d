"""Lists of texts: the loss over listed pairs is the loss over all pairs with a bias of -inf on the others."""

import random
from dataclasses import replace
from itertools import product

import pytest
import torch
from accuracy import check, evaluate
from problems import DIFFERENTIABLE, FORMS, Case, Problem, make

from pacl_kernels import PaclLoss, compatibility, fused_pacl_loss, mine

NEEDS = (*DIFFERENTIABLE, "pair_bias")
LOSSES = ("infonce", "sigmoid")
INF = float("inf")


def lists(b: int, k: int, m: int, kind: str, generator: torch.Generator) -> torch.Tensor:
    """Return lists `[B, M]`: numbers of texts in any order, and -1."""
    if kind == "full":
        return torch.stack([torch.randperm(k, generator=generator) for _ in range(b)])
    index = torch.randint(-1, k, (b, m), generator=generator)
    if kind == "own":  # with the own caption, at any place
        index[torch.arange(b), torch.randint(m, (b,), generator=generator)] = torch.arange(b) % k
    if kind == "repeats":
        index[:, m // 2 :] = index[:, : m - m // 2].clone()
        index[0] = index[0, 0]
    if kind == "empty":
        index[::2] = -1
    if kind == "none":
        index.fill_(-1)
    return index


KINDS = ("own", "full", "repeats", "empty", "none")
GIVEN = ("ids", "targets", "bias", "ids-bias", "targets-bias")


def with_lists(problem: Problem, kind: str, given: str, m: int = 4, seed: int = 0) -> Problem:
    """Return the problem with lists of `kind`, and what `given` names, in the dtype of φ."""
    generator = torch.Generator().manual_seed(seed)
    b, k, wide = len(problem.patches), len(problem.texts), torch.promote_types(problem.patches.dtype, torch.float32)
    index = lists(b, k, m, kind, generator)
    pairs = {"text_index": index.int() if seed % 2 else index}
    if "ids" in given:
        pairs["image_ids"] = torch.randint(-2, b, (b,), generator=generator)
        pairs["text_ids"] = torch.randint(-2, b, (k,), generator=generator)
    if "targets" in given:
        targets = torch.rand(index.shape, generator=generator, dtype=wide)
        pairs["targets"] = targets * (torch.rand(index.shape, generator=generator) > 0.5)
    if "bias" in given:
        bias = torch.randn(index.shape, generator=generator, dtype=wide)
        pairs["pair_bias"] = bias.masked_fill(torch.rand(index.shape, generator=generator) > 0.8, -INF)
    return replace(problem, pairs={name: x.to(problem.patches.device) for name, x in pairs.items()})


def dense(values: torch.Tensor, index: torch.Tensor, k: int, rest: float) -> torch.Tensor:
    """Return values of lists as `[B, K]`; of a text that is twice in a list the first entry counts."""
    out = values.new_full((len(values), k), rest)
    for b, row in enumerate(index.tolist()):
        for m in reversed(range(len(row))):
            if 0 <= row[m] < k:
                out[b, row[m]] = values[b, m]
    return out


def over_all_pairs(problem: Problem) -> Problem:
    """Return the problem without lists, in which all pairs that are not listed have a bias of -inf."""
    pairs, k = dict(problem.pairs), len(problem.texts)
    index = pairs.pop("text_index")
    wide = torch.promote_types(problem.patches.dtype, torch.float32)
    bias = pairs.get("pair_bias", torch.zeros(index.shape, dtype=wide))
    pairs["pair_bias"] = dense(bias, index, k, -INF)
    if "targets" in pairs:
        pairs["targets"] = dense(pairs["targets"], index, k, 0.0)
    return replace(problem, pairs=pairs)


@pytest.mark.parametrize("kind, given", list(product(KINDS, GIVEN)))
def test_the_loss_over_all_pairs(kind, given):
    """In float64 value and gradients equal those of the dense loss; so do those of the reference."""
    b, k = 6, 6 if given == "bias" else 9
    number = KINDS.index(kind) + GIVEN.index(given)
    form, loss = FORMS[number % 3], LOSSES[number % 2]
    mask = "random" if kind == "repeats" else None
    problem = with_lists(make(Case(b, 5, 11, K=k, mask=mask), form, loss, torch.float64), kind, given, seed=len(given))
    expected = evaluate(over_all_pairs(problem), "torch", NEEDS)
    for backend in ("torch", "reference"):
        answer = evaluate(problem, backend, NEEDS)
        of_bias, of_all = (x.pop("pair_bias", None) for x in (answer, dict(expected)))
        for name, x in answer.items():
            torch.testing.assert_close(x, expected[name], rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
        if of_bias is not None:
            torch.testing.assert_close(dense(of_bias, problem.pairs["text_index"], k, 0.0), of_all)


SIZES = [(5, 7, 33, 9, 4), (1, 3, 5, 4, 3), (13, 4, 17, 2, 6), (6, 1, 8, 6, 1), (3, 50, 65, 71, 40)]
TEMPERATURES = [dict(tau=0.05, scale=100.0), dict(tau=1.0, scale=1.0), dict(tau=0.02, scale=14.0, mask="random")]
SAMPLE = random.Random(31).sample(list(product(SIZES, TEMPERATURES, FORMS, LOSSES, KINDS, GIVEN)), 12)


@pytest.mark.parametrize("sizes, options, form, loss, kind, given", SAMPLE)
def test_against_the_reference(sizes, options, form, loss, kind, given, target):
    b, n, d, k, m = sizes
    case = Case(b, n, d, K=b if given == "bias" else k, **options)
    problem = with_lists(make(case, form, loss, target.dtype, target.device), kind, given, m)
    check(problem, target.backend, NEEDS)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("loss", LOSSES)
def test_packed_patches(form, loss, single):
    """Packed patches of any lengths give what padded and masked ones give."""
    generator = torch.Generator().manual_seed(2)
    lengths = (4, 0, 7, 4, 1)
    padded, mask = torch.randn(5, 7, 12, generator=generator), torch.arange(7) < torch.tensor(lengths)[:, None]
    texts, index = torch.randn(9, 12, generator=generator), torch.randint(-1, 9, (5, 6), generator=generator)
    rest = {"attn_temperature": 0.1, "form": form, "loss": loss, "text_ids": torch.arange(9) % 5}

    def step(patches, **layout):
        leaves = [x.to(single.device).requires_grad_() for x in (patches, texts.clone())]
        given = {name: x.to(single.device) for name, x in {"text_index": index, "text_ids": rest["text_ids"]}.items()}
        value = fused_pacl_loss(*leaves, 5.0, **(rest | given), **layout, backend=single.backend)
        return value, *torch.autograd.grad(value, leaves)

    packed = step(padded[mask], patch_lengths=list(lengths))
    expected = step(padded.clone(), patch_mask=mask.to(single.device))
    for got, wanted in zip(packed, (*expected[:1], expected[1][mask], expected[2]), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("form", FORMS)
def test_compatibility(form, single):
    """φ of the lists is that of all pairs at the listed ones, 0 elsewhere; here a repeated text is two entries."""
    problem = make(Case(4, 6, 10, K=7), form, "compatibility", torch.float32, single.device)
    index = torch.tensor([[3, 3, -1], [6, 0, 1], [-1, -1, -1], [2, 5, 4]], device=single.device)
    weights = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).to(single.device)
    answers = []
    for listed in (True, False):
        leaves = [x.clone().requires_grad_() for x in (problem.patches, problem.texts, problem.attn_temperature)]
        choices = {"attn_temperature": leaves[2], "form": form, "backend": single.backend}
        if listed:
            phi = compatibility(*leaves[:2], **choices, text_index=index)
        else:
            phi = compatibility(*leaves[:2], **choices).gather(1, index.clamp_min(0)).masked_fill(index < 0, 0.0)
        answers.append((phi, *torch.autograd.grad(phi, leaves, weights)))
    for got, expected in zip(*answers, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert (answers[0][0][index < 0] == 0).all() and (answers[0][1][2] == 0).all()


@pytest.mark.parametrize("options", [{"null_patch": True}, {"normalize": "none"}, {"normalize": "values"}], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_options_of_the_attention(form, options):
    """The null patch and rows that are not normalised work as with all pairs."""
    problem = with_lists(make(Case(5, 6, 10, K=8), form, "infonce", torch.float64), "own", "ids")
    leaves = [x.clone().requires_grad_() for x in (problem.patches, problem.texts, problem.attn_temperature)]

    def step(pairs):
        value = fused_pacl_loss(*leaves[:2], 3.0, attn_temperature=leaves[2], form=form, **pairs, **options)
        return value, *torch.autograd.grad(value, leaves)

    torch.testing.assert_close(step(problem.pairs), step(over_all_pairs(problem).pairs))


@pytest.mark.parametrize("loss", LOSSES)
def test_compiled(loss, cpu_backend):
    """`torch.compile(fullgraph=True)` gives the same answer: the module, under autocast."""
    problem = with_lists(make(Case(5, 7, 33, K=9), "cosine", loss), "repeats", "ids-bias")
    module = PaclLoss(problem.attn_temperature, "cosine", loss, backend=cpu_backend)

    def step(function):
        leaves = [x.clone().requires_grad_() for x in (problem.patches, problem.texts, problem.logit_scale)]
        with torch.autocast("cpu", torch.bfloat16):
            value = function(*leaves, **problem.pairs)
        return value, *torch.autograd.grad(value, leaves)

    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for got, expected in zip(step(compiled), step(module), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("form", FORMS)
def test_the_same_bits_for_any_threads(form, cpu_backend, single):
    """Value and gradients have the same bits for any number of threads."""
    problem = with_lists(make(Case(70, 8, 64, K=90), form, "infonce", torch.float32, single.device), "own", "ids", 30)
    threads = torch.get_num_threads()
    try:
        answers = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            answers.append(evaluate(problem, single.backend))
    finally:
        torch.set_num_threads(threads)
    for answer in answers[1:]:
        for name, x in answer.items():
            assert x is None or torch.equal(x, answers[0][name]), name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_instruction_sets(form, dtype, isa, cpu_backend):
    """Every instruction set takes lists, here with masks and with images that have no patch."""
    case = Case(9, 37, 70, K=50, mask="random", layout="spaced")
    check(with_lists(make(case, form, "infonce", dtype), "own", "ids", 20), cpu_backend)


@pytest.mark.parametrize("form", ["dot", "cosine"])
@pytest.mark.parametrize("data", ["equal_images", "equal_texts"])
def test_rounded_weights_that_cancel(form, data, cpu_backend):
    """In bfloat16 the rounding of weights may show in the sum over the images alone; it is computed again."""
    case = Case(90, 3, 65, tau=0.07, scale=1.0, data=data)
    check(with_lists(make(case, form, "infonce", torch.bfloat16), "full", ""), cpu_backend)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("loss", LOSSES)
def test_an_unlisted_text_has_no_say(form, loss, single):
    """A text and an image that does not list it do not reach each other, not even as NaN."""
    problem = make(Case(4, 6, 10, K=7), form, loss, torch.float32, single.device)
    problem.patches[3] = torch.nan
    index = torch.tensor([[1, 2, -1], [-1, 1, 3], [3, 4, 2], [5, -1, -1]], device=single.device)
    ids = torch.tensor([3, 0, 1, 2, -1, -1, -1], device=single.device)
    pairs = {"text_index": index, "text_ids": ids, "pair_bias": torch.zeros(4, 3, device=single.device)}
    answers = []
    for value in (0.5, torch.nan):
        problem.texts[0] = problem.texts[6] = value
        answers.append(evaluate(replace(problem, pairs=pairs), single.backend, NEEDS))
    for answer in answers:
        assert answer["patches"][:3].isfinite().all() and answer["texts"][[1, 2, 3, 4]].isfinite().all()
        assert (answer["pair_bias"][index < 0] == 0).all()
    assert (answers[0]["texts"][[0, 6]] == 0).all()
    assert torch.equal(answers[0]["patches"][:3], answers[1]["patches"][:3])


def test_an_index_out_of_range():
    """It is an error on a CPU, and none inside `torch.compile`, where it counts as no text."""
    patches, texts = torch.randn(2, 3, 4), torch.randn(5, 4)
    arguments = {"text_ids": torch.tensor([0, 1, -1, -1, -1])}
    compiled = torch.compile(fused_pacl_loss, fullgraph=True, backend="aot_eager")
    got = compiled(patches, texts, 3.0, text_index=torch.tensor([[0, 2, 5], [1, -7, 3]]), **arguments)
    expected = fused_pacl_loss(patches, texts, 3.0, text_index=torch.tensor([[0, 2, -1], [1, -1, 3]]), **arguments)
    torch.testing.assert_close(got, expected)


INDEX = torch.zeros(4, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    "given, error, message",
    [
        ({"text_index": [[0]]}, TypeError, r"text_index is a list, expected an int64 tensor of shape \[4, M\]"),
        ({"text_index": INDEX.float()}, TypeError, "text_index is torch.float32, expected torch.int64 or torch.int32"),
        ({"text_index": INDEX.to("meta")}, ValueError, "text_index is on meta, expected cpu like patches"),
        ({"text_index": INDEX[0]}, ValueError, r"text_index has shape \[3\], expected \[4, M\] with M of at least 1"),
        ({"text_index": INDEX[:3]}, ValueError, r"text_index has shape \[3, 3\], expected \[4, M\]"),
        ({"text_index": INDEX[:, :0]}, ValueError, r"text_index has shape \[4, 0\], expected \[4, M\] with M of at"),
        ({"text_index": INDEX + 6}, ValueError, "text_index has 6, expected the number of one of the 6 texts, or -1"),
        ({"text_index": INDEX - 2}, ValueError, "text_index has -2, expected the number of one of the 6 texts, or -1"),
        ({"targets": torch.ones(4, 6), "text_ids": None}, ValueError, r"targets has shape \[4, 6\], expected \[4, 3\]"),
        ({"pair_bias": torch.ones(4, 6)}, ValueError, r"pair_bias has shape \[4, 6\], expected \[4, 3\]"),
        ({"text_ids": None}, ValueError, "texts has 6 rows, expected one for each of the 4 images of patches, or"),
    ],
)
def test_refuses(given, error, message):
    arguments = {"patches": torch.ones(4, 2, 5), "texts": torch.ones(6, 5), "text_ids": torch.zeros(6).long()}
    arguments = {"text_index": INDEX, "logit_scale": 1.0} | arguments | given
    with pytest.raises(error, match=message):
        fused_pacl_loss(**arguments)


def test_mine():
    """Positives come first, then the hardest negatives; a φ of -inf is in no list, and -1 fills a list."""
    phi = torch.tensor([[0.1, 0.9, 0.4, 0.4], [0.3, -INF, 0.2, 0.8], [0.5, 0.6, -0.7, 0.8]])
    text_ids = torch.tensor([0, 1, 2, 0])
    assert mine(phi, 3, text_ids=text_ids).tolist() == [[0, 3, 1], [3, 0, 2], [2, 3, 1]]
    assert mine(phi, 1, text_ids=text_ids.int()).tolist() == [[0], [3], [2]]
    assert mine(phi, 5, text_ids=text_ids).tolist() == [[0, 3, 1, 2, -1], [3, 0, 2, -1, -1], [2, 3, 1, 0, -1]]
    assert mine(phi, 2, torch.tensor([-1, -1, 0]), text_ids).tolist() == [[1, 2], [3, 0], [0, 3]]
    assert mine(phi[:, :3].bfloat16(), 2).tolist() == [[0, 1], [0, 2], [2, 1]]


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (([[1.0]], 1), TypeError, "phi is a list, expected a floating-point tensor of shape"),
        ((torch.ones(3, 3).long(), 1), TypeError, "phi is torch.int64, expected a floating-point tensor of shape"),
        ((torch.ones(3), 1), ValueError, r"phi has shape \[3\], expected \[B, K\]"),
        ((torch.ones(3, 3), 1.0), TypeError, "m is a float, expected an int"),
        ((torch.ones(3, 3), 0), ValueError, "m is 0, expected at least 1"),
        ((torch.ones(3, 4), 1), ValueError, r"phi has shape \[3, 4\], expected as many texts as images, or text_ids"),
        ((torch.ones(3, 4), 1, torch.arange(4)), ValueError, r"image_ids has shape \[4\], expected \[3\]"),
        ((torch.ones(3, 4), 1, None, torch.ones(4)), TypeError, "text_ids is torch.float32, expected torch.int64 or"),
    ],
)
def test_mine_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        mine(*arguments)


def test_mined_lists_train(cpu_backend):
    """The loss over the lists of all texts that `mine` returns is the loss over all pairs."""
    problem = make(Case(8, 5, 16), "dot", "infonce")
    arguments = problem.patches, problem.texts, 10.0
    with torch.no_grad():
        index = mine(compatibility(*arguments[:2]), 8)
    torch.testing.assert_close(fused_pacl_loss(*arguments, text_index=index), fused_pacl_loss(*arguments))
