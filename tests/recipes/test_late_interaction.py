"""The token-level losses of `examples/recipes/late_interaction.py` are the formulas of other codebases, and learn.

The formulas were written down from reading lucidrains/x-clip (FILIP), lightonai/pylate and
hcompai/late-interaction-kernels (MaxSim) and marshuang80/gloria; no code was copied.
"""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from pacl_kernels import compatibility

PATH = Path(__file__).parents[2] / "examples" / "recipes" / "late_interaction.py"
RECIPE = runpy.run_path(str(PATH))
B, N, L, D = 6, 9, 5, 16


@pytest.fixture
def inputs():
    """Return raw patches [B, N, D], tokens [B, L, D] with NaN at padding, and the number of tokens of each text."""
    generator = torch.Generator().manual_seed(0)
    patches, tokens = (torch.randn(B, n, D, generator=generator, dtype=torch.float64) for n in (N, L))
    lengths = [5, 1, 3, 2, 4, 5]
    for text, length in enumerate(lengths):
        tokens[text, length:] = float("nan")
    return patches.requires_grad_(), tokens.requires_grad_(), lengths


def mask(lengths, longest):
    return torch.arange(longest) < torch.tensor(lengths)[:, None]


def table(score, images, texts):
    """Return [B, K] of a score of one image and one text."""
    return torch.stack([torch.stack([score(image, text) for text in texts]) for image in images])


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def assert_same(got, expected, *leaves):
    torch.testing.assert_close(got, expected)
    mine, true = (torch.autograd.grad(x, leaves, torch.ones_like(x), retain_graph=True) for x in (got, expected))
    torch.testing.assert_close(mine, true)


def both_ways(rows, columns):
    own = torch.arange(len(rows))
    return (F.cross_entropy(rows, own) + F.cross_entropy(columns, own)) / 2


def test_filip(inputs):
    patches, tokens, lengths = inputs
    texts = [unit(x[:length]) for x, length in zip(tokens, lengths, strict=True)]
    text_side = table(lambda p, t: (t @ p.T).amax(1).mean(), unit(patches), texts)
    image_side = table(lambda p, t: (t @ p.T).amax(0).mean(), unit(patches), texts)
    got = RECIPE["filip_loss"](patches, tokens, mask(lengths, L), 14.3)
    assert_same(got, both_ways(14.3 * image_side, 14.3 * text_side.T), patches, tokens)


def test_colbert_with_more_pages_than_queries(inputs):
    pages, tokens, lengths = inputs
    queries, page_lengths = tokens[:4], [9, 3, 1, 7, 2, 5]
    real_pages = [unit(x[:length]) for x, length in zip(pages, page_lengths, strict=True)]
    real_queries = [unit(x[:length]) for x, length in zip(queries, lengths[:4], strict=True)]
    scores = table(lambda p, t: (t @ p.T).amax(1).sum(), real_pages, real_queries).T
    expected = F.cross_entropy(scores / 0.1, torch.arange(4))
    got = RECIPE["colbert_loss"](pages, queries, mask(lengths[:4], L), mask(page_lengths, N), 0.1)
    assert_same(got, expected, pages, tokens)


def test_pylate_counts_padding_of_pages_as_zero(inputs):
    """PyLate multiplies scores with the mask: a page with padding has one more token, of score 0."""
    pages, tokens, lengths = inputs
    page_lengths = [8, 3, 1, 7, 2, 5]
    s = torch.einsum("ash,bth->abst", unit(tokens.nan_to_num(1.0)), unit(pages))
    s = s * mask(lengths, L)[:, None, :, None] * mask(page_lengths, N)[None, :, None]
    options = dict(form="max", patch_mask=mask(page_lengths, N), text_mask=mask(lengths, L), text_pool="sum")
    got = compatibility(pages, tokens, null_patch=True, **options)
    assert_same(got, s.amax(-1).sum(-1).T, pages, tokens)
    assert (got - compatibility(pages, tokens, **options)).abs().max() > 0.01


def test_gloria(inputs):
    """Equal to GLoRIA's local loss without its first softmax, over the words."""
    regions, words, lengths = inputs

    def score(p, t):
        attention = (4.0 * t @ p.T).softmax(1)  # [words, regions]
        return (5.0 * F.cosine_similarity(attention @ p, t, dim=1)).exp().sum().log()

    texts = [x[:length] for x, length in zip(words, lengths, strict=True)]
    logits = 10.0 * table(score, regions, texts)
    assert_same(RECIPE["gloria_loss"](regions, words, mask(lengths, L)), both_ways(logits, logits.T), regions, words)


@pytest.mark.parametrize("score", ["filip", "colbert", "gloria"])
def test_it_learns(score, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(PATH), "--score", score])
    runpy.run_path(str(PATH), run_name="__main__")
    printed = capsys.readouterr().out
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)$", printed, re.MULTILINE)]
    assert len(losses) == 4 and losses[-1] < 0.5 * losses[0]
    assert float(re.search(r"images: ([\d.]+) %", printed)[1]) > 50, "chance is 0.5 %"
