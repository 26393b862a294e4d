"""Tests of the form "max": ties, NaN, the winner's index in place of a log-sum-exp, and its own blocks of work."""

from dataclasses import replace

import pytest
import torch
from accuracy import as_chosen, check, evaluate, winners
from problems import Case, make

from pacl_kernels import compatibility, reference

# The CPU works in blocks of 8 MiB of patches and 10 MiB of texts in float32; each case needs several blocks.
BLOCKS = [
    Case(2, 110, 20001, K=140),
    Case(3, 110, 20001, K=140, mask="random", layout="offset"),
    Case(40, 60, 1025, K=33, layout="strided"),
    Case(1100, 1, 5, K=9),
    Case(2, 3, 7, K=4500),
]


def _exact(n, d, target, mask=False):
    """Make patches and texts with four elements ±1: every norm is 2 and every score is exact, and so are ties."""
    generator = torch.Generator().manual_seed(n * d)

    def draw(count):
        x = torch.zeros(count, d, dtype=torch.float64)
        places = torch.rand(count, d, generator=generator).argsort(1)[:, :4]
        signs = 2.0 * torch.randint(2, (count, 4), generator=generator, dtype=torch.float64) - 1
        return x.scatter_(1, places, signs)

    few = draw(12)  # few distinct patches, so that most have copies
    patches = few[torch.randint(12, (5, n), generator=generator)].to(target.device, target.dtype)
    texts = torch.cat([few[:4], -few[4:6], draw(31)]).to(target.device, target.dtype)
    patch_mask = torch.rand(5, n, generator=generator) < 0.5 if mask else None
    patch_mask = None if patch_mask is None else patch_mask.to(target.device)
    problem = make(Case(5, n, d, K=37), "max", "compatibility", target.dtype, target.device)
    return replace(problem, patches=patches, texts=texts, patch_mask=patch_mask)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("n, d", [(1, 9), (30, 6), (300, 20), (113, 70), (260, 64)])
def test_first_of_equals(n, d, mask, target):
    problem = _exact(n, d, target, mask)
    scores = torch.einsum("bnd,kd->bkn", problem.patches.double() / 2, problem.texts.double() / 2)
    if mask:
        scores = scores.masked_fill(~problem.patch_mask[:, None], float("-inf"))
    places = torch.arange(n, device=target.device)
    expected = torch.where(scores == scores.amax(-1, keepdim=True), places, n).amin(-1)
    expected[scores.amax(-1).isneginf()] = -1
    assert torch.equal(winners(problem, target.backend), expected)
    answer = check(problem, target.backend)
    assert n == 1 or mask or ((scores == scores.amax(-1, keepdim=True)).sum(-1) > 1).any(), "no ties"
    never = torch.ones(5, n + 1, dtype=torch.bool, device=target.device).scatter_(1, expected.remainder(n + 1), False)
    assert (answer["patches"][never[:, :n]] == 0).all(), "a patch that never wins has a gradient"
    assert torch.equal(reference.first_maximum(scores)[expected >= 0], expected[expected >= 0])


@pytest.mark.parametrize("d", [3, 67, 256])
def test_the_first_of_copies_wins(d, target):
    """The first of equal patches wins, although a copy elsewhere in a tile may be rounded to other bits."""
    for seed, (b, n, k, times) in enumerate([(4, 40, 50, 5), *[(1, 2, 1, 5), (2, 3, 2, 2), (2, 7, 1, 3)] * 5]):
        problem = make(Case(b, n, d, K=k), "max", "compatibility", target.dtype, target.device, seed)
        doubled = replace(problem, patches=problem.patches.repeat(1, times, 1))
        assert (winners(doubled, target.backend) < n).all()
        assert (check(doubled, target.backend)["patches"][:, n:] == 0).all()
        patches = doubled.patches.clone()
        patches[:, 0] = float("nan")
        hidden = torch.ones(patches.shape[:2], dtype=torch.bool, device=target.device)
        hidden[:, 0] = False  # its first copy is now the first valid one
        index = winners(replace(doubled, patches=patches, patch_mask=hidden), target.backend)
        assert ((index > 0) & (index <= n)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("d", [3, 67, 256])
def test_copies_of_a_patch_score_the_same_bits(d, dtype, cpu_backend):
    """Copies do not change the winner, because sums have the same order wherever a patch lies."""
    problem = make(Case(4, 40, d, K=50), "max", "compatibility", dtype)
    doubled = replace(problem, patches=problem.patches.repeat(1, 5, 1))
    assert torch.equal(winners(doubled, cpu_backend), winners(problem, cpu_backend))


def test_a_patch_without_a_direction_among_its_copies(target):
    """0 and -0 score the same: if every other score is negative, the first of them wins."""
    problem = make(Case(2, 6, 5, K=3), "max", "compatibility", target.dtype, target.device)
    patches, texts = -problem.texts[:1].abs().expand(2, 6, 5).clone(), problem.texts.abs()
    patches[:, 2], patches[:, 4] = -0.0, 0.0
    assert (winners(replace(problem, patches=patches, texts=texts), target.backend) == 2).all()


def test_the_first_nan_wins(target):
    problem = make(Case(3, 150, 33, K=70), "max", "compatibility", target.dtype, target.device)
    for places in ([0], [149], [130, 17, 60], [0, 1, 2]):
        patches = problem.patches.clone()
        patches[1, places, 5] = float("nan")
        spoilt = replace(problem, patches=patches)
        index, phi = winners(spoilt, target.backend), evaluate(spoilt, target.backend)["value"]
        assert (index[1] == min(places)).all() and phi[1].isnan().all()
        assert torch.equal(index[[0, 2]], winners(problem, target.backend)[[0, 2]])
        hidden = torch.ones(3, 150, dtype=torch.bool, device=target.device)
        hidden[1, places] = False
        check(replace(spoilt, patch_mask=hidden), target.backend)
        assert compatibility(patches, problem.texts, form="max", backend="reference")[1].isnan().all()


def test_the_temperature_is_ignored(target):
    """Every τ gives the same bits, and its gradient is 0, not None, because DDP waits for a gradient."""
    problem = make(Case(4, 9, 21), "max", "infonce", target.dtype, target.device)
    expected = evaluate(problem, target.backend)
    tau = problem.attn_temperature
    for value in (1e-3, 50.0, float("nan")):
        answer = evaluate(replace(problem, attn_temperature=torch.full_like(tau, value)), target.backend)
        assert all(torch.equal(answer[name], x) for name, x in expected.items())
        assert answer["attn_temperature"] == 0
    for form_of_tau in (tau, tau.reshape(1), tau.reshape(1, 1)):
        leaf = form_of_tau.clone().requires_grad_()
        for backend in (target.backend, "reference"):
            options = {"attn_temperature": leaf, "form": "max", "backend": backend}
            phi = compatibility(problem.patches, problem.texts, **options)
            (grad,) = torch.autograd.grad(phi.sum(), leaf)
            assert phi.shape == (4, 4) and grad.shape == leaf.shape and (grad == 0).all()


@pytest.mark.sampled(6)
@pytest.mark.parametrize("case", BLOCKS, ids=str)
def test_more_than_one_block(case, single):
    check(make(case, "max", "compatibility", device=single.device), single.backend)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("case", BLOCKS, ids=str)
def test_blocks_on_any_number_of_threads(case, cpu_backend):
    problem = make(case, "max", "compatibility", torch.bfloat16)
    torch.set_num_threads(1)
    alone = check(problem, cpu_backend)
    for threads in (2, 5):
        torch.set_num_threads(threads)
        answer = evaluate(problem, cpu_backend)
        assert all(torch.equal(answer[name], value) for name, value in alone.items())


def test_one_dimension_has_no_gradient(target):
    """With D = 1 gradients are 0, because a gradient is orthogonal to its embedding."""
    problem = make(Case(6, 9, 1, K=5), "max", "compatibility", target.dtype, target.device)
    answer = evaluate(problem, target.backend)
    norms = problem.patches.abs().double()
    assert (answer["patches"].double() * norms).abs().max() < 1e-12
    assert (answer["texts"].double() * problem.texts.abs().double()).abs().max() < 1e-12


def test_a_wrong_winner_is_seen(single):
    """`check` refuses a backend's winner whose score is not the maximum."""
    problem = make(Case(4, 9, 21), "max", "compatibility", device=single.device)
    index = winners(problem, single.backend)
    wide = problem.to(torch.float64)
    with as_chosen(problem, index):
        evaluate(wide, "reference")
    index[2, 1] = (index[2, 1] + 1) % 9
    with as_chosen(problem, index), pytest.raises(AssertionError, match="too low"):
        evaluate(wide, "reference")
