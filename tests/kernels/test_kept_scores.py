"""The forward on a CPU keeps scores in the memory of the patches' gradient; the backward's bits do not depend on it."""

import pytest
import torch
from accuracy import evaluate
from problems import Case, make

import pacl_kernels
from pacl_kernels.autograd import Options, keeping
from pacl_kernels.backends import cpu
from pacl_kernels.checks import Inputs
from pacl_kernels.native import native

FORMS = ("dot", "cosine")  # `max` computes no scores in its backward
CASES = [
    Case(5, 7, 3),  # room for no panel of texts
    Case(40, 49, 64, K=100),  # room for some of the panels
    Case(64, 196, 128, K=64),  # several groups of rows
    Case(3, 2000, 64, K=5),  # an image larger than a group
    Case(98, 1, 600, K=70),
    Case(7, 14, 1100, K=1030),  # several blocks of texts
    Case(9, 100, 64, K=33, tau=0.02),
    Case(9, 100, 64, K=33, tau=1.0),
    Case(64, 100, 128, K=64, mask="random"),  # several groups, whose rows and places differ
    Case(64, 100, 64, K=33, mask="random", tau=1.0),
    Case(5, 1500, 64, K=33, mask="last"),
    Case(4, 9, 64, K=33, mask="all"),
    Case(400, 5, 128, K=40, tau=1.0),  # in bfloat16, blocks that are shortened because they hold many images
]


@pytest.fixture
def no_matrix_unit(monkeypatch) -> None:
    """Choose the best instruction set without a matrix unit, with which bfloat16 scores are not kept."""
    names = [name for name in native().isas() if "amx" not in name]
    monkeypatch.setenv("PACL_CPU_ISA", names[-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_same_bits_without_kept_scores(case, form, dtype, cpu_backend, no_matrix_unit, monkeypatch):
    problem = make(case, form, "compatibility", dtype)
    kept = evaluate(problem, cpu_backend)
    monkeypatch.setattr(cpu, "keeps_scores", lambda *_: False)
    for name, value in evaluate(problem, cpu_backend).items():
        assert torch.equal(kept[name], value), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask", [None, "random"])
def test_the_backward_reads_them(mask, form, dtype, cpu_backend, no_matrix_unit):
    """Scores of zero in the memory give another gradient: the backward did not compute them again."""
    if dtype == torch.bfloat16 and "bf16" not in native().cpu_isa():
        pytest.skip("bfloat16 rows of this length are float32 here")
    problem = make(Case(20, 50, 128, K=40, mask=mask), form, "compatibility", dtype)
    phi, state = torch.empty_like(problem.upstream), torch.empty_like(problem.upstream)
    scores = torch.empty_like(problem.patches)
    inputs = problem.patches, problem.texts, problem.patch_mask, None, 0.1, form, cpu_backend, phi, state
    torch.ops.pacl_kernels.compatibility_forward(*inputs, scores)
    texts = []
    for memory in (scores.clone(), torch.zeros_like(scores)):
        grad = torch.empty_like(problem.texts)
        torch.ops.pacl_kernels.compatibility_backward(*inputs, problem.upstream, memory, grad, None, None, True)
        texts.append(grad)
    assert texts[0].isfinite().all() and not torch.equal(*texts)


@pytest.mark.parametrize("form", FORMS)
def test_a_second_backward_computes_them_again(form, cpu_backend):
    """The first backward has overwritten the scores with its gradient, which is the caller's."""
    problem = make(Case(20, 50, 128), form, "infonce")
    patches, texts = problem.patches.requires_grad_(), problem.texts.requires_grad_()
    loss = pacl_kernels.fused_pacl_loss(patches, texts, 10.0, attn_temperature=0.1, form=form, backend=cpu_backend)
    first = torch.autograd.grad(loss, (patches, texts), retain_graph=True)
    copies = [x.clone() for x in first]
    second = torch.autograd.grad(loss, (patches, texts), retain_graph=True)
    (alone,) = torch.autograd.grad(loss, texts)
    assert first[0].data_ptr() != second[0].data_ptr()
    for one, copy, two in zip(first, copies, second, strict=True):
        assert torch.equal(one, copy) and torch.equal(one, two)
    assert torch.equal(alone, first[1])


def test_where_they_are_kept(cpu_backend):
    """Memory for the gradient is taken in the forward only where a backward for patches is to come."""
    patches = torch.randn(3, 5, 16, requires_grad=True)
    options = Options("dot", "infonce", cpu_backend)

    def keeps(options, patches, mask=None) -> bool:
        return bool(keeping(options, Inputs(patches, None, mask, 1.0)).kept)

    assert keeps(options, patches)
    assert not keeps(options, patches.detach())
    assert keeps(options, patches, torch.ones(3, 5, dtype=torch.bool))
    assert not keeps(options._replace(text_pool="mean"), patches)
    assert not keeps(options._replace(form="max"), patches)
    assert not keeps(options._replace(backend="torch"), patches)
    with torch.no_grad():
        assert not keeps(options, patches)
    seen = []
    torch.func.grad(lambda x: (seen.append(keeps(options, x)), x.sum())[1])(patches.detach())
    assert seen == [False]


@pytest.mark.parametrize("form", FORMS)
def test_forwards_of_parts_keep_the_scores_of_one_backward(form, cpu_backend):
    """Forward the parts of a gather of texts: the memory then holds what one forward of all texts leaves there."""
    problem = make(Case(20, 50, 128, K=96, mask="random"), form, "compatibility")
    scores = torch.zeros(2, *problem.patches.shape)

    def forward(texts, memory, *part) -> None:
        phi, state = torch.empty(2, 20, len(texts))
        inputs = problem.patches, texts, problem.patch_mask, None, 0.1, form, cpu_backend, phi, state
        torch.ops.pacl_kernels.compatibility_forward(*inputs, memory, *[None] * 4, 1.0, False, "both", None, *part)

    forward(problem.texts, scores[0])
    for first, last in ((32, 64), (0, 32), (64, 96)):
        forward(problem.texts[first:last], scores[1], 96, first)
    assert scores[0].any() and torch.equal(*scores)
