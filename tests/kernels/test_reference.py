"""The reference agrees with loops over single numbers and with the paper's formula, and defines the edge cases."""

import math

import pytest
import torch
from problems import FORMS, Case, make
from torch.nn import functional as F

from pacl_kernels import reference


def _phi(patches, texts, tau, form, mask=None):
    """Compute φ with one loop per index, in Python's floats."""

    def unit(x):
        norm = math.sqrt(sum(v * v for v in x))
        return [v / norm for v in x] if norm >= 1e-12 else [0.0] * len(x)

    rows = []
    for b, image in enumerate(patches.tolist()):
        kept = [unit(p) for n, p in enumerate(image) if mask is None or mask[b, n]]
        rows.append([])
        for text in texts.tolist():
            t = unit(text)
            s = [sum(x * y for x, y in zip(p, t, strict=True)) for p in kept]
            if form == "max":
                rows[-1].append(max(s, default=0.0))
                continue
            weights = [math.exp((v - max(s)) / tau) for v in s]
            a = [w / sum(weights) for w in weights]
            phi = sum(x * y for x, y in zip(a, s, strict=True))
            if form == "cosine":
                pooled = [sum(w * p[d] for w, p in zip(a, kept, strict=True)) for d in range(len(t))]
                phi /= max(math.sqrt(sum(v * v for v in pooled)), 1e-6)
            rows[-1].append(phi)
    return torch.tensor(rows, dtype=torch.float64)


def _loss(logits, loss):
    """Compute a loss from single numbers."""
    z, b = logits.tolist(), len(logits)
    if loss == "sigmoid":
        return sum(math.log1p(math.exp(-z[i][k] if i == k else z[i][k])) for i in range(b) for k in range(b)) / b
    rows = sum(math.log(sum(math.exp(v) for v in z[i])) - z[i][i] for i in range(b))
    columns = sum(math.log(sum(math.exp(z[i][k]) for i in range(b))) - z[k][k] for k in range(b))
    return (rows + columns) / (2 * b)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask", [None, "random", "one", "none"])
@pytest.mark.parametrize("data", ["related", "opposite", "zero_patches", "zero_texts"])
def test_against_loops(form, mask, data):
    problem = make(Case(4, 6, 3, tau=0.3, scale=5.0, mask=mask, data=data), form, "infonce", torch.float64)
    options = {"patch_mask": problem.patch_mask, "attn_temperature": 0.3, "form": form}
    phi = _phi(problem.patches, problem.texts, 0.3, form, problem.patch_mask)
    torch.testing.assert_close(
        reference.compatibility(problem.patches, problem.texts, **options), phi, rtol=1e-12, atol=1e-12
    )
    for loss in ("infonce", "sigmoid"):
        got = reference.pacl_loss(problem.patches, problem.texts, 5.0, **options, loss=loss, logit_bias=-0.5)
        assert got.item() == pytest.approx(_loss(5.0 * phi - 0.5, loss), rel=1e-12)


def test_against_the_paper_as_published():
    """The reference equals the paper's steps: einsum, softmax, einsum to pool patches, then dot product or cosine."""
    torch.manual_seed(0)
    patches, texts = torch.randn(5, 7, 11, dtype=torch.float64), torch.randn(6, 11, dtype=torch.float64)
    p, t = F.normalize(patches, dim=-1), F.normalize(texts, dim=-1)
    attention = (torch.einsum("bnd,kd->bkn", p, t) / 0.2).softmax(-1)
    pooled = torch.einsum("bkn,bnd->bkd", attention, p)
    expected = {"dot": (pooled * t).sum(-1), "cosine": F.cosine_similarity(pooled, t[None], dim=-1)}
    for form, phi in expected.items():
        got = reference.compatibility(patches, texts, attn_temperature=0.2, form=form)
        torch.testing.assert_close(got, phi, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
@pytest.mark.parametrize("mask", [None, "random"])
def test_gradcheck(form, loss, mask):
    problem = make(Case(3, 4, 3, tau=0.3, scale=5.0, mask=mask), form, loss, torch.float64)
    patches = problem.patches if mask is None else problem.patches.masked_fill(~problem.patch_mask[..., None], 0.5)

    def function(patches, texts, scale, bias, tau):
        options = {"patch_mask": problem.patch_mask, "form": form, "loss": loss}
        return reference.pacl_loss(patches, texts, scale, attn_temperature=tau, logit_bias=bias, **options)

    inputs = (patches, problem.texts, problem.logit_scale, problem.logit_bias, problem.attn_temperature)
    assert torch.autograd.gradcheck(function, [x.clone().requires_grad_() for x in inputs])


def test_definitions_at_the_edges():
    """The reference defines an image without patches, rows without a direction, and NaN in masked patches."""
    patches = torch.randn(3, 4, 5, dtype=torch.float64)
    texts = torch.randn(3, 5, dtype=torch.float64)
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[0] = False
    mask[1, 2] = False
    patches[~mask] = float("nan")
    patches[2, 0], texts[1] = 0.0, 1e-13 * texts[1] / texts[1].norm()
    for form in FORMS:
        p, t = patches.clone().requires_grad_(), texts.clone().requires_grad_()
        phi = reference.compatibility(p, t, patch_mask=mask, attn_temperature=0.1, form=form)
        assert (phi[0] == 0).all() and (phi[:, 1] == 0).all() and (phi[1, [0, 2]] != 0).all()
        assert (phi[2] >= 0).all() if form == "max" else (phi[2, [0, 2]] != 0).all()  # its first patch, s = 0, may win
        phi.square().sum().backward()
        assert (p.grad[~mask] == 0).all() and (p.grad[2, 0] == 0).all() and (t.grad[1] == 0).all()
        assert p.grad[1].abs().max() > 0 and t.grad[0].abs().max() > 0


def test_limits_of_the_temperature():
    """Attention goes to the best patch alone for τ → 0, and equally to all patches for τ → ∞."""
    torch.manual_seed(0)
    patches, texts = torch.randn(4, 9, 8, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    scores = torch.einsum("bnd,kd->bkn", F.normalize(patches, dim=-1), F.normalize(texts, dim=-1))
    for form in FORMS:
        coldest = reference.compatibility(patches, texts, attn_temperature=1e-5, form=form)
        torch.testing.assert_close(coldest, scores.amax(-1), rtol=1e-9, atol=1e-9)
    hottest = reference.compatibility(patches, texts, attn_temperature=1e9)
    torch.testing.assert_close(hottest, scores.mean(-1), rtol=1e-7, atol=1e-9)
