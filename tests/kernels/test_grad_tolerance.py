"""`grad_tolerance`: a backward over the pairs that matter, its accuracy over lists, its bound, and what it reports."""

import random

import pytest
import torch
from accuracy import assert_accurate, evaluate, natural_sizes
from layouts import RAW, SINGLE, Layout
from problems import FORMS, Case, make

import pacl_kernels
from pacl_kernels import PaclLoss, compatibility, fused_pacl_loss, kept_pairs
from pacl_kernels.backends import cpu
from pacl_kernels.native import native
from pacl_kernels.tolerance import lists_from, threshold

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ONLY_ZEROS = 1e-30  # leaves out pairs without any gradient
CASES = [
    Case(5, 49, 64, K=70),
    Case(3, 200, 130, K=33, tau=1.0),
    Case(9, 1, 65, K=5, tau=0.02),
    Case(6, 23, 64, K=40, mask="random", layout="strided"),
    Case(3, 12, 64, K=1100),  # lists of several blocks of texts
    Case(7, 30, 96, K=50, data="equal_images", tau=0.05),
    Case(7, 30, 96, K=50, data="equal_texts", tau=0.05),
    Case(4, 9, 1, K=6),
]


@pytest.fixture
def always_lists(monkeypatch) -> None:
    monkeypatch.setattr(cpu, "_lists_are_worth", lambda *_: True)


def sparse(upstream, seed=0):
    """Set most of ∂L/∂φ to 0: all of the first image, none of the second."""
    keep = torch.rand(upstream.shape, generator=torch.Generator().manual_seed(seed)) < 0.3
    keep[0], keep[1:2] = False, True
    return torch.where(keep.to(upstream.device), upstream, 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_over_lists(case, form, dtype, cpu_backend, always_lists):
    check_lists(case, form, dtype)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_gradients_over_lists_on_every_instruction_set(form, dtype, isa, always_lists):
    for case in (CASES[0], CASES[5]):
        check_lists(case, form, dtype)


def check_lists(case, form, dtype):
    problem = make(case, form, "compatibility", dtype)
    problem = problem.__class__(**vars(problem) | {"upstream": sparse(problem.upstream)})
    exact = evaluate(problem, "cpu")
    truth, plain = (
        evaluate(problem.to(wide), "reference") if form != "max" else None for wide in (torch.float64, torch.float32)
    )
    leaves = [x.clone().requires_grad_() for x in (problem.patches, problem.texts, problem.attn_temperature)]
    phi = compatibility(
        *leaves[:2], attn_temperature=leaves[2], form=form, patch_mask=problem.patch_mask, grad_tolerance=ONLY_ZEROS
    )
    phi.backward(problem.upstream)
    kept = kept_pairs(phi)
    assert kept.kept == problem.upstream.count_nonzero() and kept.pairs == phi.numel() and kept.dropped_mass < 1e-29
    sizes = natural_sizes(problem)
    for name, leaf in zip(("patches", "texts", "attn_temperature"), leaves, strict=True):
        if truth is None:  # the winners are those of the same forward
            torch.testing.assert_close(leaf.grad, exact[name], rtol=2e-2 if dtype != torch.float32 else 1e-4, atol=1e-6)
            continue
        coarser = dtype if leaf.dtype == dtype else torch.bfloat16 if dtype == torch.bfloat16 else dtype
        assert_accurate(name, leaf.grad, truth[name], coarser, plain[name].double(), sizes[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_layout_over_lists(dtype, cpu_backend, always_lists):
    """Packed patches, masks, the null patch and raw rows, in a sample."""
    of_pairs = [x for x in SINGLE + RAW if x[1] == "single" and x[6] != "values" and x[7] == "compatibility"]
    for number, arguments in enumerate(random.Random(0).sample(of_pairs, 24)):
        layout = Layout(*arguments, seed=number)
        layout.upstream, layout.of_backend = sparse(layout.upstream, number), {"grad_tolerance": ONLY_ZEROS}
        layout.check(cpu_backend, dtype)


def gradients(tolerance, form="dot", loss="infonce", dtype=torch.float32, size=(40, 40, 9, 24), **options):
    """Return the loss and its gradients for patches and texts, the pairs of which differ much in weight."""
    generator = torch.Generator().manual_seed(0)
    b, k, n, d = size
    patches, texts = torch.randn(b, n, d, generator=generator), torch.randn(k, d, generator=generator)
    patches += texts[torch.arange(b) % k, None] * 0.7
    leaves = [x.to(dtype).requires_grad_() for x in (patches, texts)] + [torch.tensor(0.3, requires_grad=True)]
    scale = torch.tensor(30.0, requires_grad=True)
    if loss == "sigmoid":
        options = {"logit_bias": -12.0, **options}
    value = fused_pacl_loss(
        *leaves[:2], scale, attn_temperature=leaves[2], form=form, loss=loss, grad_tolerance=tolerance, **options
    )
    value.backward()
    return value, [x.grad for x in (*leaves, scale)], leaves


@pytest.mark.parametrize("tolerance", [2**-4, 2**-9])
@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
@pytest.mark.parametrize("form", FORMS)
def test_the_error_is_within_the_bound(form, loss, tolerance, cpu_backend, always_lists):
    size = 14, 14, 5, 12
    exact, expected, leaves = gradients(0.0, form, loss, size=size)
    value, found, _ = gradients(tolerance, form, loss, size=size)
    torch.testing.assert_close(value, exact, rtol=1e-6, atol=0)
    kept = kept_pairs(value)
    assert 0 < kept.dropped_mass <= tolerance and kept.kept < kept.pairs == 14 * 14
    assert torch.equal(found[3], expected[3]) or loss == "sigmoid"  # the logit scale's gradient is exact

    patches, texts, tau = (x.detach().double().requires_grad_() for x in leaves)
    phi = pacl_kernels.reference.compatibility(patches, texts, attn_temperature=tau, form=form)
    logits = (30.0 * phi).detach().requires_grad_()
    labels = torch.arange(14)
    if loss == "infonce":
        formula = torch.nn.functional.cross_entropy
        total = (formula(logits, labels) + formula(logits.T, labels)) / 2
    else:
        total = -torch.nn.functional.logsigmoid((2 * torch.eye(14) - 1) * (logits - 12)).sum() / 14
    mass = 30.0 * torch.autograd.grad(total, logits)[0].abs().sum()
    largest = [0.0, 0.0, 0.0]
    for pair in phi.flatten():
        of_pair = torch.autograd.grad(pair, (patches, texts, tau), retain_graph=True, allow_unused=True)
        for i, x in enumerate(of_pair):
            if x is not None:
                largest[i] = max(largest[i], float(x.norm()))
    for name, one, two, most in zip(("patches", "texts", "tau"), found, expected, largest, strict=False):
        error = (one.double() - two).norm()
        assert error <= kept.dropped_mass * mass * most + 1e-4 * two.norm(), name


def test_nothing_to_drop_gives_the_bits_of_the_exact_step(cpu_backend):
    for form in FORMS:
        exact, found = gradients(0.0, form, size=(40, 40, 9, 24)), gradients(1e-7, form, size=(40, 40, 9, 24))
        kept = kept_pairs(found[0])
        assert kept == (1600, 1600, 0.0) and kept.share == 1
        assert all(torch.equal(one, two) for one, two in zip(exact[1], found[1], strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_any_number_of_threads_gives_the_same_bits(form, dtype, cpu_backend, always_lists):
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(gradients(2**-6, form, dtype=dtype, size=(50, 50, 30, 128))[1])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


def test_the_threshold():
    """It is the largest within the tolerance, up to the width of a bin, and a larger tolerance keeps fewer pairs."""
    g = torch.randn(300, 70, generator=torch.Generator().manual_seed(0)).double().pow(5)
    g = g.float().contiguous()
    last = g.numel()
    for tolerance in (1e-6, 1e-3, 2**-4, 0.3, 0.9):
        least, count, mass = threshold(g, tolerance)
        kept = g.abs() >= least
        dropped = float(g[~kept].abs().double().sum() / g.abs().double().sum())
        assert count == kept.sum() <= last and dropped <= mass <= tolerance
        more = g.abs() >= least * 2 ** (1 / 16)
        assert float(g[~more].abs().double().sum() / g.abs().double().sum()) > tolerance * 0.93
        lists, last = lists_from(g, least), count
        assert torch.equal(lists.starts.diff(), kept.sum(1)) and torch.equal(
            lists.places, kept.flatten().nonzero()[:, 0]
        )
        assert torch.equal(lists.texts, kept.nonzero()[:, 1].int())
    for bad in (float("nan"), float("inf")):
        g[3, 4] = bad
        assert threshold(g, 0.5) == (0.0, g.numel(), 0.0)
    assert threshold(torch.zeros(3, 4), 0.5) == (0.0, 12, 0.0)


def test_the_workspace_stays_below_64_mib(cpu_backend):
    size, n, dim = 1024, 49, 256
    patches, texts = torch.empty(size, n, dim), torch.empty(size, dim)
    lists = lists_from(torch.ones(size, size), 1.0)
    values = torch.empty(size * size)
    for form in FORMS:
        params = cpu._params(patches, texts, None, 1.0, form, None, values, values)
        kept = cpu._set_gradients(params, patches, texts, None)
        params.set(
            grad_phi=values.data_ptr(),
            list_starts=lists.starts.data_ptr(),
            list_texts=lists.texts.data_ptr(),
            threads=64,
        )
        assert native().compatibility_backward(params).workspace_bytes <= 64 * 2**20
        del kept


def test_kept_pairs(cpu_backend, always_lists):
    value, _, leaves = gradients(2**-6)
    assert kept_pairs(value * 2) == kept_pairs(value) is not None
    assert kept_pairs(torch.ones(())) is None and kept_pairs(gradients(0.0)[0]) is None
    other = gradients(2**-6, backend="torch")[0]
    assert kept_pairs(other) == (1600, 1600, 0.0), "the backend torch takes all pairs"
    given = PaclLoss(grad_tolerance=2**-6, attn_temperature=0.3)
    assert "grad_tolerance=0.015625" in repr(given)
    loss = given(*leaves[:2], 30.0, image_ids=torch.arange(40), text_ids=torch.arange(40).flip(0))
    assert kept_pairs(loss) is None
    loss.backward()
    assert kept_pairs(loss).kept < 1600


def test_compiled(cpu_backend, always_lists):
    torch.compiler.reset()
    compiled = torch.compile(fused_pacl_loss, fullgraph=True, backend="aot_eager")
    _, expected, leaves = gradients(2**-6)
    for x in leaves:
        x.grad = None
    compiled(*leaves[:2], 30.0, attn_temperature=leaves[2], grad_tolerance=2**-6).backward()
    for leaf, other in zip(leaves, expected, strict=False):
        torch.testing.assert_close(leaf.grad, other)


@pytest.mark.parametrize(
    "bad, error, message",
    [
        (True, TypeError, "grad_tolerance is a bool, expected a number"),
        (torch.tensor(0.1), TypeError, "grad_tolerance is a Tensor, expected a number"),
        (-0.1, ValueError, "grad_tolerance is -0.1, expected a number from 0 to below 1"),
        (1, ValueError, "grad_tolerance is 1, expected a number from 0 to below 1"),
        (float("nan"), ValueError, "grad_tolerance is nan, expected a number from 0 to below 1"),
    ],
)
def test_a_bad_tolerance(bad, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        fused_pacl_loss(torch.ones(2, 3, 4), torch.ones(2, 4), 1.0, grad_tolerance=bad)
