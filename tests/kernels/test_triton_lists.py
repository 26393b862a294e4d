"""Lists of texts on Triton, on a GPU if there is one, otherwise in Triton's interpreter on CPU tensors."""

from dataclasses import replace

import pytest
import torch
from accuracy import check, evaluate
from layouts import layout_with_lists
from problems import FORMS, Case, make
from test_grad_tolerance import sparse
from test_text_index import NEEDS, over_all_pairs, with_lists
from test_triton import DEVICE

from pacl_kernels import available_backends, compatibility, kept_pairs
from pacl_kernels.backends.gpu import lists as gpu_lists
from pacl_kernels.backends.gpu import workspace

pytestmark = pytest.mark.skipif(available_backends()["triton"] is not None, reason=str(available_backends()["triton"]))

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Case, form, dtype, lists and length of a list.
CASES = [
    (Case(5, 7, 33, K=9, mask="random"), "dot", BF16, "own", 4),
    (Case(5, 7, 33, K=9, mask="random"), "cosine", F16, "repeats", 4),
    (Case(5, 7, 33, K=9, mask="random"), "max", BF16, "own", 4),
    (Case(2, 300, 20, K=3, tau=0.01), "dot", F32, "full", 3),  # two tiles of patches
    (Case(1, 257, 16, K=3), "max", F32, "full", 3),
    (Case(2, 3, 140, K=40, tau=0.02, layout="strided"), "cosine", F32, "own", 33),  # two tiles of D
    (Case(4, 6, 17, data="norms"), "dot", F16, "empty", 3),
    (Case(4, 6, 17, mask="none"), "cosine", F32, "none", 3),
    (Case(4, 9, 16, data="duplicated"), "max", F16, "empty", 3),
]


@pytest.mark.parametrize("case, form, dtype, kind, m", CASES, ids=str)
def test_against_the_reference(case, form, dtype, kind, m):
    loss = "sigmoid" if m == 4 else "infonce"
    check(with_lists(make(case, form, loss, dtype, DEVICE), kind, "targets", m), "triton", NEEDS)


@pytest.mark.parametrize("form", FORMS)
def test_blocks_of_images(form, monkeypatch):
    """Blocks of one image each give the same as the loss over all pairs; every run gives the same bits."""
    problem = with_lists(make(Case(3, 4, 16, K=5), form, "infonce", F32, DEVICE), "own", "targets-bias")
    monkeypatch.setattr(workspace, "WORKSPACE", 100)
    blocks, again = (evaluate(problem, "triton") for _ in range(2))
    expected = evaluate(over_all_pairs(problem), "torch")
    for name, x in blocks.items():
        if x is not None:
            assert torch.equal(x, again[name]), name
            torch.testing.assert_close(x, expected[name], rtol=2e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("form", ["dot", "max"])
def test_null_patch(form):
    """The null patch works as on the backend in plain PyTorch; no text of a list of none has a gradient."""
    problem = with_lists(make(Case(3, 4, 8, K=5), form, "compatibility", F32, DEVICE), "own", "")
    index = problem.pairs["text_index"]
    answers = []
    for backend in ("triton", "torch"):
        leaves = [
            x.detach().clone().requires_grad_()
            for x in (problem.patches - 0.3, problem.texts, problem.attn_temperature)
        ]
        options = {"attn_temperature": leaves[2], "form": form, "null_patch": True, "backend": backend}
        phi = compatibility(*leaves[:2], text_index=index, **options)
        answers.append((phi, *torch.autograd.grad(phi.sin().sum(), leaves)))
    for got, expected in zip(*answers, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("form, dtype", [("dot", F32), ("dot", F16), ("cosine", BF16)])
def test_the_pairs_that_matter(form, dtype, monkeypatch):
    """With `grad_tolerance` lists differ in length, from none to all texts; images with similar ones share a block."""
    monkeypatch.setattr(gpu_lists, "_lists_are_worth", lambda *_: True)
    monkeypatch.setattr(workspace, "WORKSPACE", 9000)
    problem = make(Case(5, 4, 16, K=6, mask="random"), form, "compatibility", dtype, DEVICE)
    problem = replace(problem, upstream=sparse(problem.upstream))
    expected = evaluate(problem, "triton")
    leaves = [x.detach().clone().requires_grad_() for x in (problem.patches, problem.texts, problem.attn_temperature)]
    options = {"attn_temperature": leaves[2], "form": form, "patch_mask": problem.patch_mask, "backend": "triton"}
    phi = compatibility(*leaves[:2], grad_tolerance=1e-30, **options)
    phi.backward(problem.upstream)
    assert kept_pairs(phi).kept == problem.upstream.count_nonzero()
    eps = 2e-2 if dtype == BF16 else 2e-3 if dtype == F16 else 1e-5
    for leaf, name in zip(leaves, ("patches", "texts", "attn_temperature"), strict=True):
        wanted = expected[name].float()
        assert (leaf.grad.float() - wanted).norm() <= eps * wanted.norm(), name


def test_a_list_without_a_say():
    """A NaN in a text reaches no image that does not list it, and the image of a NaN no text that it does not list."""
    problem = with_lists(make(Case(4, 5, 8, K=6), "dot", "infonce", F32, DEVICE), "own", "bias")
    index = torch.tensor([[1, 2], [-1, 1], [4, -1], [5, 5]], device=DEVICE)
    problem = replace(problem, pairs={"text_index": index, "text_ids": torch.arange(6, device=DEVICE)})
    problem.patches[3], problem.texts[0] = torch.nan, torch.nan
    answer = evaluate(problem, "triton")
    assert answer["patches"][:3].isfinite().all() and answer["texts"][[1, 2, 3, 4]].isfinite().all()
    assert (answer["texts"][[0, 3]] == 0).all()


def test_texts_of_many_tokens():
    """A list of texts becomes a list of their tokens, whose padding the kernels leave out."""
    layout = layout_with_lists("mask", "tokens-mask", "logsumexp", "dot", 0.3, False, "both", "infonce")
    layout.check("triton", F32, DEVICE)
