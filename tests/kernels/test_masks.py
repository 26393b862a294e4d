"""Masked patches may hold NaN or inf, have gradients of exactly 0, and count as if they were cut off."""

from dataclasses import replace

import pytest
import torch
from accuracy import assert_accurate, check, check_case, evaluate
from problems import FORMS, Case, make

CASES = [
    *(Case(mask=mask) for mask in ("random", "all", "none", "one", "first", "last")),
    *(Case(N=1, mask=mask) for mask in ("random", "all", "none")),
    Case(1, 9, 1, mask="random"),
    Case(3, 1369, 5, mask="first"),
    Case(2, 197, 129, mask="random", tau=0.01, scale=100.0),
    Case(49, 50, 65, mask="random"),
    Case(4, 64, 48, K=97, mask="random"),
    Case(4, 64, 48, K=97, mask="one"),
    Case(7, 16, 20, mask="random", data="zero_patches"),
    Case(7, 16, 20, mask="first", data="opposite"),
]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_masked(case, form, target):
    """NaN and inf in masked patches reach neither the value nor any gradient."""
    for objective in case.objectives:
        problem = make(case, form, objective, target.dtype, target.device)
        mask = problem.patch_mask
        assert mask.all() or not problem.patches[~mask].isfinite().any()
        answer = check_case(case, form, objective, target.backend, target.dtype, target.device)
        assert all(grad.isfinite().all() for grad in answer.values() if grad is not None)
        assert (answer["patches"][~mask] == 0).all(), "a masked patch has a gradient"
        without = ~mask.any(-1)
        if objective == "compatibility":
            assert (answer["value"][without] == 0).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_masked_beside_a_patch_that_is_not_finite(value, form, target):
    """A masked patch has gradient 0, even if another patch of its image, or the loss, is not finite."""
    for objective in ("compatibility", "infonce", "sigmoid"):
        problem = make(Case(6, 11, 19, mask="random"), form, objective, target.dtype, target.device)
        patches = problem.patches.clone()
        patches[2, problem.patch_mask[2].nonzero()[-1]] = value
        answer = check(replace(problem, patches=patches), target.backend)
        assert (answer["patches"][~problem.patch_mask] == 0).all()
        assert answer["patches"][2, problem.patch_mask[2]].isnan().any(), "nothing was spoilt"


@pytest.mark.parametrize("form", FORMS)
def test_an_image_without_a_patch_and_a_text_that_is_not_finite(form, target):
    """An image without patches has φ = 0, not 0 x NaN, also with a text that is not finite."""
    for mask in ("random", "none"):
        problem = make(Case(5, 7, 19, K=4, mask=mask), form, "compatibility", target.dtype, target.device)
        texts = problem.texts.clone()
        texts[2, 3] = float("nan")
        answer = check(replace(problem, texts=texts), target.backend)
        without = ~problem.patch_mask.any(1)
        assert without.any() and (answer["value"][without] == 0).all()
        assert answer["value"][~without, 2].isnan().all()


@pytest.mark.parametrize("form", FORMS)
def test_same_as_cutting_off(form, target):
    """An image with a mask gives the answer of the same image alone without its masked patches."""
    problem = make(Case(5, 23, 19, K=7, mask="random"), form, "compatibility", target.dtype, target.device)
    masked = evaluate(problem, target.backend)
    texts = torch.zeros_like(masked["texts"], dtype=torch.float64)
    for b in range(1, 5):  # image 0 has no patch left
        kept = problem.patch_mask[b]
        patches, upstream = problem.patches[b : b + 1, kept], problem.upstream[b : b + 1]
        alone = evaluate(replace(problem, patches=patches, upstream=upstream, patch_mask=None), target.backend)
        assert_accurate("value", masked["value"][b : b + 1], alone["value"], target.dtype)
        assert_accurate("patches", masked["patches"][b, kept], alone["patches"][0], target.dtype)
        texts += alone["texts"]
    assert_accurate("texts", masked["texts"], texts, target.dtype)


def test_mask_of_any_strides(single):
    """A mask may be a slice, a transpose, or one row expanded to all images."""
    case = Case(6, 10, 17)
    for mask in (
        (torch.rand(6, 20) < 0.5)[:, ::2],
        (torch.rand(10, 6) < 0.5).T,
        (torch.arange(10) < 7).expand(6, 10),
    ):
        mask = mask.to(single.device)
        assert not mask.is_contiguous()
        problem = make(case, "dot", "infonce", device=single.device)
        check(replace(problem, patch_mask=mask), single.backend)


@pytest.mark.parametrize("form", FORMS)
def test_all_valid_mask_changes_nothing(form, target):
    problem = make(Case(5, 23, 19), form, "infonce", target.dtype, target.device)
    without = evaluate(problem, target.backend)
    everything = torch.ones(5, 23, dtype=torch.bool, device=target.device)
    for name, value in evaluate(replace(problem, patch_mask=everything), target.backend).items():
        assert_accurate(name, value, without[name], target.dtype)
